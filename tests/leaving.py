"""The end of a process among several."""

import os
import sys

import torch.distributed as dist


def leave():
    """End this process once all are done; gloo's own end now and then waits for ever for a process that has left."""
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
