"""TRL's GRPOTrainer with the NRT reward, with our engine as its sampler, and with the NRT loss; docs/trl.md."""

from nrt_fast.adapters.trl.loss import LossMixin
from nrt_fast.adapters.trl.reward import NRTReward
from nrt_fast.adapters.trl.rollout import RolloutMixin

nrt_reward = NRTReward()
nrt_rollout = nrt_reward.rollout

__all__ = ["LossMixin", "NRTReward", "RolloutMixin", "nrt_reward", "nrt_rollout"]
