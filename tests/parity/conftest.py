from engines import ON_GPU

collect_ignore = ["test_accelerator.py", "test_async_engine.py", "test_tensor_parallel.py"] if ON_GPU else []
"""Emulations of a GPU on a CPU, in modules of vLLM that cannot be imported beside those for GPUs."""
