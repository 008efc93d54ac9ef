"""Load adapter folders that metapeft wrote into Hugging Face PEFT, and store the logits it computes with them.

    python check_export.py BASE_FOLDER TOKENS.json OUT.safetensors ADAPTER_FOLDER…

TOKENS.json holds the token ids of a batch, {"tokens": [[…], …], "lengths": […]}. OUT gets one tensor per adapter
folder, under its name: logits (batch, tokens, vocabulary). Runs in the environment of requirements.txt (see README.md).
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def main(base: str, batch: str, out: str, *adapters: str) -> None:
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows = json.loads(Path(batch).read_text())
    tokens = torch.tensor(rows["tokens"])
    mask = (torch.arange(tokens.shape[1])[None] < torch.tensor(rows["lengths"])[:, None]).long()
    results = {}
    for folder in map(Path, adapters):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
        with warnings.catch_warnings():
            # PEFT only warns of weights that it found no place for, or places it found no weights for.
            warnings.filterwarnings("error", message=".*(missing|unexpected) (adapter )?keys.*")
            model = PeftModel.from_pretrained(model, folder).eval()
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=mask).logits
        results[folder.name] = logits[:, -tokens.shape[1] :].contiguous()
    save_file(results, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
