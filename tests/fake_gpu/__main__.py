"""A process with the fake device: `python -m tests.fake_gpu iteration` runs that module's `main`."""

import os
import sys
from importlib import import_module

from . import guard

guard.load()  # before torch, which all others import
import_module(f"{__package__}.{sys.argv[1]}").main()
sys.stdout.flush()
os._exit(0)  # torch's thread for the device's backward passes would sometimes abort a process that ends by itself
