"""Fill in a function with an exported model, through transformers alone.

    python examples/infill.py runs/demo/hf

Nothing of megatron_dlm is imported: what is needed is in the export.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FUNCTION = "def is_empty(self, name):\n    if name is ____:\n        return ____\n    ____\n    return True\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="of an export of a masked diffusion model")
    parser.add_argument("--text", default=FUNCTION, help="with ____ wherever tokens are missing")
    parser.add_argument("--tokens", type=int, default=6, help="of every ____ (%(default)s)")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.directory, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(args.directory, trust_remote_code=True)
    ids: list[int] = []
    for index, part in enumerate(args.text.split("____")):
        ids += [model.config.mask_token_id] * (args.tokens if index else 0)
        ids += tokenizer(part, add_special_tokens=False).input_ids
    filled = model.generate(torch.tensor([ids]), max_new_tokens=0)
    print(f"{model.num_parameters():,} parameters; given:\n\n{args.text}\nfilled in:\n")
    print(tokenizer.decode(filled[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
