"""The GPU's kernels run here too: interpreted, where there is no GPU to compile them for."""

import os
from importlib.util import find_spec

import torch

if find_spec("triton") and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
