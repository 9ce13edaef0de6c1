"""Other trainers on this engine, one package each. They import their trainer where it is used; the core knows none."""
