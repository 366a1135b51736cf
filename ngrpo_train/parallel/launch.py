"""Rank and number of processes, from the launcher's environment variables: known without importing torch.

That import takes seconds. After a process group is made, `processes` has both.
"""

import os


def rank_at_launch() -> int:
    """This process's number among those that were started together; 0 where it was started alone."""
    return int(os.environ.get("RANK", "0"))


def world_size_at_launch() -> int:
    """The number of processes that were started together; 1 where this one was started alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))
