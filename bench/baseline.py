"""STS-B of a bag of embeddings: the mean of the teacher's input word embeddings, the floor that an encoder must pass.

    python bench/baseline.py --data_dir DIR
"""
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from scipy.stats import pearsonr, spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_6layer_deltanet import UserError, load_sts_splits, load_teacher, parse_config, tokenise  # noqa: E402


def main(argv: list[str]) -> int:
    """Print Pearson and Spearman of both splits; returns the exit status."""
    try:
        cfg = parse_config(argv)
        teacher, tokenizer, _ = load_teacher(cfg)
        table = teacher.model.embeddings.word_embeddings.weight.numpy()
        for split, rows in load_sts_splits(cfg).items():
            first, second, gold = zip(*rows)
            tokens = tokenise(tokenizer, [*first, *second], None)
            vectors = np.stack([table[t[1:-1]].mean(0) if len(t) > 2 else table[0] for t in tokens])
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            cosine = (vectors[:len(rows)] * vectors[len(rows):]).sum(1)
            pearson, spearman = (f(cosine, gold).statistic for f in (pearsonr, spearmanr))
            print(f"{cfg['sts_name']} {split}: Pearson {pearson:.4f}, Spearman {spearman:.4f}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
