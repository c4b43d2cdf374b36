"""Tiny language models with random weights, saved as Hugging Face saves them, and a small data set with texts."""

from __future__ import annotations

import numpy as np
import torch
from conftest import write_log

WORDS = ["a", "b", "c", "d", "title", "kind", ":", ",", "red", "green", "blue", "[UNK]", "[PAD]"]
WORDS += [f"w{n}" for n in range(40)]
SIZE = 32


def tiny_llm(directory, family: str = "bert") -> str:
    """A model of two layers and a word-level tokenizer below `directory`; its path."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    sizes = {
        "vocab_size": len(WORDS), "hidden_size": SIZE, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(7)
    if family == "bert":
        model = transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False)
    elif family == "roberta":
        config = transformers.RobertaConfig(**sizes, pad_token_id=1)
        model = transformers.RobertaModel(config, add_pooling_layer=False)
    elif family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=len(WORDS), n_embd=SIZE, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2
        )
        model = transformers.GPT2Model(config)
    elif family == "llama":
        model = transformers.LlamaModel(transformers.LlamaConfig(**sizes, num_key_value_heads=2))
    else:
        raise ValueError(family)
    target = directory / family
    model.save_pretrained(target, safe_serialization=True)
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(target)
    return str(target)


def write_items(directory, name: str = "tiny", items: int = 25, without: int = 2) -> None:
    """A .item file beside the log; the last `without` items have no row."""
    rng = np.random.default_rng(0)
    rows = ["item_id:token\ttitle:token_seq\tkind:token\tprice:float"]
    for item in range(items - without):
        words = " ".join(f"w{n}" for n in rng.integers(0, 40, rng.integers(1, 4)))
        rows.append(f"i{item}\t{words}\t{['red', 'green', 'blue'][item % 3]}\t{item}")
    (directory / name / f"{name}.item").write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_data(directory, log) -> None:
    """Log and items below `directory`."""
    write_log(directory, "tiny", log)
    write_items(directory)


def small(directory, llm: str, **options):
    """Options of a quick DARec run."""
    base = {
        "item_text_encoder": llm, "data_path": str(directory), "MAX_ITEM_LIST_LENGTH": 8, "show_progress": False,
        "epochs": 2,
        "train_batch_size": 64, "checkpoint_dir": str(directory / "saved"), "state": "WARNING", "item_text_length": 8,
        "text_items": 8, "adapter_sizes": 4, "token_budget": 400, "threads": 1, "llm_precision": "float32",
        "hidden_size": 16, "inner_size": 16, "n_layers": 1, "item_text_size": 12,
    }  # fmt: skip
    return {**base, **options}
