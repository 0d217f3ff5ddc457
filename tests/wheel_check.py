"""The Python of the README in an environment that holds an installed sensibert, for example `dist/*.whl`.

    ENVIRONMENT/bin/python tests/wheel_check.py

It runs the snippet as it stands in a folder of its own, with a tiny model in place of bert-base-uncased and no network,
and compares the logits of the trimmed model with those that a fresh process computes from the saved folder. Prints the
version and where sensibert was imported from. Needs nothing but what sensibert itself depends on."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the film was good dull".split()
LOGITS = """
import json, torch
torch.set_num_threads(1)

def logits(model):
    for parameter in model.parameters():  # a file's bytes may lie at odd addresses, where BLAS may sum in another order
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        return model.cpu().eval()(torch.tensor([[2, 5, 6, 7, 8, 3], [2, 9, 6, 5, 7, 3]])).logits.tolist()
"""
RELOADED = """
import sensibert
from transformers import AutoModelForSequenceClassification
print(json.dumps(logits(AutoModelForSequenceClassification.from_pretrained("small"))))
"""


def prepare() -> None:
    """A tiny model under the name of the README, and its training file, in the working directory."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **sizes)
    BertForSequenceClassification(config).save_pretrained("bert-base-uncased")
    Path("vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer("vocab.txt").save_pretrained("bert-base-uncased")
    rows = ["the film was good,1", "the film was dull,0"] * 24
    Path("train.csv").write_text("\n".join(["sentence,label", *rows]))


def main() -> None:
    (snippet,) = re.findall(
        r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HF_HOME": folder, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        os.chdir(folder)
        prepare()
        names: dict = {}
        exec(snippet + LOGITS, names)
        whole = names["AutoModelForSequenceClassification"].from_pretrained("bert-base-uncased")
        trimmed = names["model"]
        assert trimmed.num_parameters() < whole.num_parameters(), "nothing was trimmed"
        done = subprocess.run([sys.executable, "-c", LOGITS + RELOADED], stdout=subprocess.PIPE, text=True)
        assert done.returncode == 0, "the saved folder does not reload"
        reloaded = json.loads(done.stdout.splitlines()[-1])
        assert reloaded == names["logits"](trimmed), "the reloaded model gives other logits"
        os.chdir(Path(folder).parent)  # so that the folder can be removed everywhere
    import sensibert

    print(f"sensibert {sensibert.__version__} from {Path(sensibert.__file__).parent}: equal logits after a reload")


if __name__ == "__main__":
    main()
