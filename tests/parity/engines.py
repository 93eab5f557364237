"""Which accelerator the engines of these tests run on."""

import torch

ON_GPU = torch.cuda.is_available()
ON_ACCELERATOR = {"gpu_memory_utilization": 0.08} if ON_GPU else {"worker_cls": "accelerator.AcceleratorWorker"}
"""Engine arguments: a part of the real accelerator for each engine, or the emulation in accelerator.py, eager."""
