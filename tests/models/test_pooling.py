import json

import pytest
import torch

from sensibert.core.errors import SensibertError
from sensibert.models.pooling import Pooling, read_pooling

KIND = "sentence_transformers.models."
OLD = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


def folder(path, modules=("Transformer", "Pooling", "Normalize"), pooling=OLD, **files):
    """A sentence-transformers folder without a model. files: name with _ for . -> content."""
    places = {"Transformer": "", "Pooling": "1_Pooling"}
    listed = [{"type": KIND + m, "path": places.get(m, f"{i}_{m}")} for i, m in enumerate(modules)]
    (path / "1_Pooling").mkdir(parents=True)
    (path / "modules.json").write_text(json.dumps(listed))
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    for name, content in files.items():
        (path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_a_folder_without_modules_has_mean_pooling(tmp_path):
    assert read_pooling(str(tmp_path)) == Pooling("mean", normalize=False, prompts=("",), max_length=None)


@pytest.mark.parametrize(
    "config, mode",
    [
        (OLD, "cls"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_cls_token": False}, "max"),
        ({"embedding_dimension": 32, "pooling_mode": "cls", "include_prompt": True}, "cls"),
        ({"pooling_mode": ["max"]}, "max"),
        ({}, "mean"),
    ],
)
def test_the_pooling_of_all_versions_is_read(config, mode, tmp_path):
    assert read_pooling(folder(tmp_path / "st", pooling=config)) == Pooling(mode, normalize=True)
    plain = folder(tmp_path / "plain", ("Transformer", "Pooling"), config)
    assert read_pooling(plain) == Pooling(mode, normalize=False)


def test_lengths_and_prompts_are_read(tmp_path):
    lengths = {"max_seq_length": 128, "do_lower_case": True}
    prompts = {"prompts": {"query": "query: ", "document": "doc: ", "other": "doc: "}, "default_prompt_name": None}
    files = {"sentence_bert_config": lengths, "config_sentence_transformers": prompts}
    all_of_them = read_pooling(folder(tmp_path / "all", **files))
    assert all_of_them == Pooling("cls", True, ("query: ", "doc: "), 128, lower_case=True)
    files["config_sentence_transformers"] = prompts | {"default_prompt_name": "document"}
    assert read_pooling(folder(tmp_path / "default", **files)).prompts == ("doc: ",)
    files["config_sentence_transformers"] = {"prompts": {"query": "", "document": ""}, "default_prompt_name": None}
    assert read_pooling(folder(tmp_path / "empty", **files)).prompts == ("",)


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"modules": ("Transformer", "Pooling", "Dense")},
            "modules.json has the modules Transformer, Pooling, Dense; wa",
        ),
        ({"modules": ("Transformer",)}, "has the modules Transformer; want Transformer, Pooling and perhaps Normalize"),
        ({"modules": ("Pooling", "Transformer")}, "has the modules Pooling, Transformer; want"),
        ({"pooling": {"pooling_mode": "lasttoken"}}, "config.json has the pooling lasttoken; want mean, cls or max"),
        ({"pooling": OLD | {"pooling_mode_max_tokens": True}}, "has the pooling cls and max; want mean, cls or max"),
        ({"pooling": {"pooling_mode": 3}}, r"has the pooling 3; want"),
        ({"pooling": []}, r"1_Pooling/config.json is a list, want an object"),
        ({"sentence_bert_config": "{"}, "sentence_bert_config.json cannot be read"),
        (
            {"config_sentence_transformers": {"prompts": [1]}},
            r"has the prompts a list, want an object of texts",
        ),
        (
            {"config_sentence_transformers": {"prompts": {"query": "q"}, "default_prompt_name": "passage"}},
            r"default_prompt_name .passage., want one of its prompts \(query\)",
        ),
        (
            {"config_sentence_transformers": {"prompts": {"q": "q: "}}, "pooling": OLD | {"include_prompt": False}},
            "has include_prompt false; want one that pools all tokens",
        ),
    ],
)
def test_what_cannot_be_trimmed_is_refused(changed, message, tmp_path):
    with pytest.raises(SensibertError, match=f"^model: .*{message}"):
        read_pooling(folder(tmp_path / "st", **changed))


def test_a_missing_pooling_and_a_transformer_elsewhere_are_refused(tmp_path):
    path = tmp_path / "st"
    folder(path)
    (path / "1_Pooling" / "config.json").unlink()
    with pytest.raises(SensibertError, match="has no 1_Pooling/config.json, which its modules.json names"):
        read_pooling(str(path))
    modules = [{"type": KIND + "Transformer", "path": "0_Transformer"}, {"type": KIND + "Pooling", "path": "1_Pooling"}]
    (path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(SensibertError, match="has its Transformer in 0_Transformer, want it in the folder itself"):
        read_pooling(str(path))
    (path / "modules.json").write_text(json.dumps({"0": "Transformer"}))
    with pytest.raises(SensibertError, match="want a list of modules with their types"):
        read_pooling(str(path))


@pytest.mark.parametrize(
    "mode, expected",
    [("mean", [[2.0, 1.0], [7.0, 7.0]]), ("cls", [[1.0, 2.0], [7.0, 7.0]]), ("max", [[3.0, 2.0], [7.0, 7.0]])],
)
def test_pooling_counts_real_tokens_only(mode, expected):
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[7.0, 7.0], [99.0, 99.0]]])
    mask = torch.tensor([[1, 1], [1, 0]])
    assert Pooling(mode)(hidden, mask).tolist() == expected
    assert torch.equal(Pooling(mode)(hidden[:1]), Pooling(mode)(hidden[:1], mask[:1]))
    lengths = Pooling(mode, normalize=True)(hidden, mask).norm(dim=1)
    assert lengths.tolist() == pytest.approx([1.0, 1.0])
