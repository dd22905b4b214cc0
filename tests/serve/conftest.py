"""vLLM for tests: in this process, on a processor, with little memory. It reads its settings when it is imported."""

import os

SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}

for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)
