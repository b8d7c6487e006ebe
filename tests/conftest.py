"""Shared fixtures: the real teacher, real STS-B where it is at hand, a generated corpus, a tiny teacher."""
import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_flush_denormal(True)


@pytest.fixture(scope="session", autouse=True)
def compiled_kernel() -> None:
    """The CPU kernels are compiled once, before tests that count their seconds; two workers begin at two ends."""
    import train_6layer_deltanet as script
    cpu = script.kernel.kernels("cpu")
    kernels = [cpu.backward, cpu.pack, cpu.gelu_rows, cpu.gelu_backward_rows, cpu.normalise_rows, cpu.multiply_rows,
               cpu.forward]
    for kernel in kernels if os.environ.get("PYTEST_XDIST_WORKER") != "gw1" else reversed(kernels):
        cpu.compiled(kernel)


@pytest.fixture(autouse=True)
def torch_settings():
    """PyTorch's settings of the process, which `choose_device` changes in tests that call a `main`, as they were."""
    before = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(before[0]), torch.set_float32_matmul_precision(before[1])
    torch.use_deterministic_algorithms(before[2])
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")


@pytest.fixture(scope="module")
def few_sts_rows():
    """STS files of a tenth of their rows, in this process and in the runs that `forked.server()` starts meanwhile."""
    import train_6layer_deltanet as script
    with pytest.MonkeyPatch.context() as patch:
        for split, count in script.STS_ROWS.items():
            patch.setitem(script.STS_ROWS, split, count // 10)
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with STS-B and training pairs: $STSB_DATA_DIR, else ../shared/data beside the repository."""
    folder = Path(os.environ.get("STSB_DATA_DIR", ROOT.parent / "shared" / "data"))
    if not (folder / "sts" / "stsb-dev.tsv.gz").is_file():
        pytest.skip(f"STS-B is not at hand: no {folder}/sts/stsb-dev.tsv.gz; set STSB_DATA_DIR")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A small generated corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    subprocess.run([sys.executable, ROOT / "bench" / "make_corpus.py", "--output_dir", folder / "generated",
                    "--pairs", "2000"], check=True, capture_output=True)
    return folder / "generated"


@pytest.fixture(scope="session")
def documents(corpus, tmp_path_factory) -> Path:
    """The generated corpus with long/: 75 documents of 15 and 75 of 50 sentences, a third of them kept aside.

    A document's first sentence is its query.
    """
    folder = tmp_path_factory.mktemp("documents")
    lines = [line for file in sorted((corpus / "train").glob("*.gz")) for line in gzip.open(file, "rt")]
    texts = [*dict.fromkeys(json.loads(line)[1] for line in lines)]
    (folder / "long").mkdir()
    for name in ("train", "sts"):
        (folder / name).symlink_to(corpus / name)
    for name, length in (("first", 15), ("second", 50)):
        rows = [[texts.pop(), *random.Random(f"{name} {i}").sample(texts[:1000], length - 1)] for i in range(75)]
        with gzip.open(folder / "long" / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps([row[0], " ".join(row)]) + "\n" for row in rows)
    return folder


@pytest.fixture(scope="session")
def teacher_and_tokenizer():
    """The real teacher and its tokenizer."""
    import train_6layer_deltanet as script
    teacher, tokenizer, _ = script.load_teacher(script.config)
    return teacher, tokenizer


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> Path:
    """A folder with a random 2-layer BERT of width 32 and the real tokenizer: whole runs in seconds."""
    from transformers import BertConfig, BertModel
    import train_6layer_deltanet as script
    folder = tmp_path_factory.mktemp("tiny_teacher")
    torch.manual_seed(0)
    BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
              add_pooling_layer=False).save_pretrained(folder)
    script.load_teacher(script.config)[1].save_pretrained(folder)
    return folder
