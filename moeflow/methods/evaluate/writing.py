"""Let a whole model write, as transformers loads it."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


@torch.inference_mode()
def continued(folder: Path, prompt: str, tokens: int) -> str:
    """The text that the checkpoint's model writes behind `prompt`: at most `tokens` tokens, each its likeliest one."""
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map=device, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    asked = tokenizer(prompt, return_tensors="pt").to(device)
    out_L = model.generate(**asked, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)[0]
    return str(tokenizer.decode(out_L[asked["input_ids"].shape[1] :], skip_special_tokens=True))
