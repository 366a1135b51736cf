"""One file per algorithm: how a group is explored, how rewards become advantages, how the policy is updated."""

from ngrpo_train.algorithms.neighbor import NeighborGRPO

ALGORITHMS = {"neighbor": NeighborGRPO}

__all__ = ["ALGORITHMS", "NeighborGRPO"]
