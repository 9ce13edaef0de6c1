"""Every op in plain PyTorch, one file per family: the maths of the project, the oracle of the tests, the fallback."""
