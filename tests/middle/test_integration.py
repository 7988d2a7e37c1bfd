"""install(), the flags, and what a user sees who gets one wrong."""

import json
import sys

import pytest
import torch
import transformers
from conftest import arguments, make_llm_of_today
from safetensors.torch import load_file, save_file
from workers import Run

from hacl_llava import integration
from hacl_llava.config import PRESETS, HaclConfig


@pytest.fixture
def train_module():
    from hacl_llava import compat  # noqa: F401

    # isort: split
    import llava.train.train as module

    yield module
    integration.uninstall(vars(module))


def test_install_replaces_four_names_and_uninstall_puts_them_back(train_module):
    namespace = vars(train_module)
    before = {name: namespace[name] for name in integration.NAMES}
    integration.install(namespace)
    assert all(namespace[name] is not before[name] for name in integration.NAMES)
    once = {name: namespace[name] for name in integration.NAMES[1:]}
    integration.install(namespace, use_hacl=True)  # twice does no harm
    assert all(namespace[name] is once[name] for name in once)
    integration.uninstall(namespace)
    assert all(namespace[name] is before[name] for name in integration.NAMES)
    integration.uninstall(namespace)


def test_install_says_which_name_is_missing():
    with pytest.raises(ImportError, match="has no LLaVATrainer, make_sup.*pip install --no-deps llava-torch"):
        integration.install(dict.fromkeys(("ModelArguments", "LlavaLlamaForCausalLM"), object))


def test_use_hacl_false_puts_stock_back_before_anything_is_looked_up(train_module):
    namespace = vars(train_module)
    before = {name: namespace[name] for name in integration.NAMES}
    integration.install(namespace, use_hacl=True)
    namespace["ModelArguments"](use_hacl=False)
    assert all(namespace[name] is before[name] for name in integration.NAMES[1:])
    namespace["ModelArguments"](use_hacl=True, vision_tower="x")
    assert all(namespace[name] is not before[name] for name in integration.NAMES[1:])


def test_every_setting_is_a_flag_with_a_help_text(train_module, tmp_path):

    integration.install(vars(train_module))
    names = ("ModelArguments", "DataArguments", "TrainingArguments")
    parser = train_module.transformers.HfArgumentParser([getattr(train_module, name) for name in names])
    actions = {a.dest: a for a in parser._actions}
    for name in HaclConfig().to_dict():
        assert len(actions[f"hacl_{name}"].help) > 20
    argv = ["--use_hacl", "False", "--hacl_negatives", "global", "--hacl_queue_size", "16384", "--hacl_fused", "False"]
    argv += ["--hacl_num_hallucinated", "3", "--output_dir", str(tmp_path), "--use_cpu", "True"]
    args, _, _ = parser.parse_args_into_dataclasses(argv)
    config = HaclConfig.from_arguments(args)
    given = {"negatives": "global", "queue_size": 16384, "fused": False, "num_hallucinated": 3}
    assert config == HaclConfig(**PRESETS["default"] | given)
    assert HaclConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for argv, head_dim in (["--hacl_preset", "paper"], 0), (["--hacl_preset=paper", "--hacl_head_dim", "8"], 8):
        args, _, _ = parser.parse_args_into_dataclasses([*argv, "--use_hacl", "False", "--output_dir", str(tmp_path)])
        assert HaclConfig.from_arguments(args) == HaclConfig(queue_size=16384, head_dim=head_dim)
    for preset in PRESETS.values():
        HaclConfig(**preset)  # its parts go together


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"weight": -1}, "hacl_weight is -1, allowed is a number >= 0"),
        ({"weight": float("nan")}, "hacl_weight is nan"),
        ({"temperature": 0}, "from 0.001 to 0.5"),
        ({"negatives": "all"}, "one of own, batch, global"),
        ({"num_hallucinated": -2}, "-1 .all. or a number"),
        ({"queue_size": -1}, "16384"),
        ({"representation": "mean"}, "one of eos, prompt"),
        ({"prompt": " \n"}, "a text with a word in it"),
        ({"start": 1.0}, "from 0 to less than 1"),
        ({"start": 0.5, "end": 0.5}, r"more than hacl_start \(0.5\), at most 1"),
        ({"head_dim": -2}, "quarter"),
        ({"visual_bos": False}, "set --hacl_fused False too"),
        ({"negatives": "global", "gather": False}, "'own' or 'batch' while hacl_gather is False"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        HaclConfig(**settings)
    with pytest.raises(ValueError, match="unknown HACL settings"):
        HaclConfig.from_dict({"colour": 1})
    of_before = {"ranking": 0.0, "gradient_share": 0.0, "weight": 2}  # which had these two, unused
    assert HaclConfig.from_dict(of_before).weight == 2
    with pytest.raises(ValueError, match="unknown HACL settings.*ranking"):
        HaclConfig.from_dict({"ranking": 0.5})


# --- through main(), as a user would ----------------------------------------------------------------------------------


def run_main(monkeypatch, capsys, *argv):
    from hacl_llava.train import main

    monkeypatch.setattr(sys, "argv", ["pretrain_hacl.py", *map(str, argv)])
    status = main()
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def fails(monkeypatch, capsys, mini, tmp_path, *change):
    """One line of error and status 2."""
    status, _, err = run_main(monkeypatch, capsys, *arguments(mini, tmp_path / "out"), *change)
    line = [x for x in err.splitlines() if x.startswith("error: ")]
    assert status == 2 and len(line) == 1, err
    return line[0]


def test_bad_input_ends_with_one_line(monkeypatch, capsys, mini, tmp_path, records, train_module):
    path = tmp_path / "data.json"

    def message(rows=None, *change):
        if rows is not None:
            path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
        return fails(monkeypatch, capsys, mini, tmp_path, "--data_path", path, *change)

    assert "data.json: cannot be read (No such file or directory)" in message()
    assert "holds a dict, expected a list" in message({"a": 1})
    assert "truncated" in message(json.dumps(records)[:-200])
    assert "record 1 (id 'train-000000001') has no 'conversations'" in message(
        [records[0], {k: v for k, v in records[1].items() if k != "conversations"}]
    )
    assert "nowhere.png, which does not exist" in message([{**records[0], "image": "nowhere.png"}])
    assert "hacl_temperature is 7.0" in message(records, "--hacl_temperature", 7)
    prompt = ("--hacl_representation", "prompt", "--hacl_prompt")
    assert "has the special tokens ['</s>']" in message(records, *prompt, "in </s>")
    assert "hacl_prompt is 100 tokens, allowed are 1 to 64" in message(records, *prompt, "@" * 98 + "!")
    assert "tf32" in message(records, "--tf32", "True")  # the Trainer's own refusal, where there is no such GPU
    assert "give --vision_tower" in fails_without_tower(monkeypatch, capsys, mini, tmp_path)
    assert "--image_folder nowhere: is no folder" in message(records, "--image_folder", "nowhere")
    # Nothing to learn: the image alone fills the context (it takes 9 tokens), or no template fits.
    said = message(records, "--model_max_length", 9)
    assert "none of 32 records that were looked at has a label" in said and "larger --model_max_length" in said
    assert "is cut before its answer: it has a context of 9 tokens, of which its image takes 9" in said
    said = message(records, "--version", "mpt")
    assert "none of 32 records" in said and "masked whole by LLaVA" in said and "--version is mpt" in said


def fails_without_tower(monkeypatch, capsys, mini, tmp_path):
    argv = arguments(mini, tmp_path / "out")
    i = argv.index("--vision_tower")
    status, _, err = run_main(monkeypatch, capsys, *argv[:i], *argv[i + 2 :])
    assert status == 2
    return err


@pytest.mark.parametrize("workers", ["0", "2"])
def test_unreadable_image_in_training_is_named(mini, tmp_path, records, workers):
    (mini.images / "broken.png").write_text("not an image")
    rows = [{**r, "image": "broken.png"} if i == 3 else r for i, r in enumerate(records[:8])]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    change = ("--data_path", tmp_path / "data.json", "--use_cpu", "True", "--dataloader_num_workers", workers)
    run = Run([*arguments(mini, tmp_path / "out"), *change, "--hacl_max_failed", "0"], tmp_path / "log")
    assert run.ends() == 2
    (line,) = [x for x in run.said().splitlines() if x.startswith("error: ")]
    assert f"error: {tmp_path}/data.json: record 3 (id 'train-000000003'): cannot be used" in line
    assert "--hacl_max_failed is 0" in line and not (tmp_path / "out/mm_projector.bin").exists()


def test_unknown_value_of_a_flag(monkeypatch, capsys, mini, tmp_path, train_module):
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, capsys, *arguments(mini, tmp_path), "--hacl_negatives", "all")
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "--hacl_negatives" in err and "'all'" in err and "'own', 'batch', 'global'" in err


def test_help_reads_well(monkeypatch, capsys):
    status, out, _ = run_main(monkeypatch, capsys, "--help")
    assert status == 0 and "--hacl_negatives own|batch|global" in out and "example" in out
    with pytest.raises(SystemExit):
        run_main(monkeypatch, capsys, "--help_all")
    everything = capsys.readouterr().out
    assert "--hacl_queue_size" in everything and "--learning_rate" in everything and "--warmup_ratio" in everything
    assert len(out.splitlines()) < 128 and max(map(len, out.splitlines())) <= 120
    for name in HaclConfig().to_dict():
        assert f"--hacl_{name}" in out


def train_in_process(monkeypatch, capsys, mini, output, *more):
    torch.manual_seed(0)
    status, _, err = run_main(monkeypatch, capsys, *arguments(mini, output, "--use_cpu", "True", *more))
    assert status == 0, err
    return (
        torch.load(output / "mm_projector.bin", weights_only=True),
        json.loads((output / "trainer_state.json").read_text())["log_history"],
    )


def test_use_hacl_false_is_stock_training_bit_for_bit(monkeypatch, capsys, mini, tmp_path, train_module):
    off, log_off = train_in_process(monkeypatch, capsys, mini, tmp_path / "off", "--use_hacl", "False")
    integration.uninstall(vars(train_module))
    transformers.set_seed(42)  # as our doors do, for LLaVA makes the projector before anything is seeded
    monkeypatch.setattr(
        sys, "argv", ["train.py", *arguments(mini, tmp_path / "stock", "--use_cpu", "True", stock=True)]
    )
    train_module.train()
    stock = torch.load(tmp_path / "stock/mm_projector.bin", weights_only=True)
    log = json.loads((tmp_path / "stock/trainer_state.json").read_text())["log_history"]
    assert set(off) == set(stock) and all(torch.equal(off[k], stock[k]) for k in stock)
    assert [x.get("loss") for x in log_off] == [x.get("loss") for x in log]
    assert [x.get("grad_norm") for x in log_off] == [x.get("grad_norm") for x in log]
    names = {p.name for p in (tmp_path / "stock").iterdir()}
    assert {p.name for p in (tmp_path / "off").iterdir()} == names and "hacl_head.safetensors" not in names
    config = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("off", "stock")]
    assert config[0] == config[1]
    # control: with HACL on, the same command gives another projector
    on, log_on = train_in_process(monkeypatch, capsys, mini, tmp_path / "on")
    assert set(on) == set(stock) and not torch.equal(
        on["model.mm_projector.0.weight"], stock["model.mm_projector.0.weight"]
    )


def test_run_with_hacl_logs_its_parts_and_saves_the_heads(monkeypatch, capsys, mini, tmp_path, train_module):
    import safetensors

    projector, log = train_in_process(
        monkeypatch, capsys, mini, tmp_path / "out", "--save_strategy", "steps", "--save_steps", "2",
        "--group_by_modality_length", "True", "--hacl_queue_size", "12", "--hacl_negatives", "batch",
    )  # fmt: skip
    assert sorted(projector) == [f"model.mm_projector.{i}.{k}" for i in (0, 2) for k in ("bias", "weight")]
    steps = [x for x in log if "loss" in x]
    assert len(steps) == 4
    for x in steps:
        want = {"loss_lm", "loss_i2t", "loss_t2i", "temperature", "retrieval_accuracy", "closer_to_true"}
        assert want <= set(x)
        assert abs(x["loss"] - (x["loss_lm"] + (x["loss_i2t"] + x["loss_t2i"]) / 2)) < 2e-3
        assert 0 <= x["closer_to_true"] <= 1 and 0 <= x["retrieval_accuracy"] <= 1
    for folder in (tmp_path / "out", tmp_path / "out/checkpoint-2", tmp_path / "out/checkpoint-4"):
        assert (folder / "mm_projector.bin").exists() and (folder / "config.json").exists()
        with safetensors.safe_open(folder / "hacl_head.safetensors", "pt") as file:
            assert set(file.keys()) == {
                "log_temperature", "text.bias", "text.weight", "visual.bias", "visual.weight",
            }  # fmt: skip
            assert json.loads(file.metadata()["hacl"])["queue_size"] == 12
    # The heads have trained (the release left them at their start).
    first, last = (safetensors.torch.load_file(tmp_path / "out" / n / "hacl_head.safetensors")
                   for n in ("checkpoint-2", "checkpoint-4"))  # fmt: skip
    assert all(not torch.equal(first[k], last[k]) for k in first)
    # A second start in the same folder finds nothing left to do, and leaves the same.
    again, log = train_in_process(
        monkeypatch, capsys, mini, tmp_path / "out", "--group_by_modality_length", "True", "--hacl_queue_size", "12",
        "--hacl_negatives", "batch",
    )  # fmt: skip
    assert all(torch.equal(again[k], projector[k]) for k in projector) and [x for x in log if "loss" in x] == steps


def test_the_seed_is_the_whole_run(monkeypatch, capsys, mini, tmp_path, train_module):
    first, log = train_in_process(monkeypatch, capsys, mini, tmp_path / "a", "--seed", "3")
    torch.manual_seed(123)  # whatever stood in the generator before
    status, _, _ = run_main(monkeypatch, capsys, *arguments(mini, tmp_path / "b", "--use_cpu", "True", "--seed", "3"))
    second = torch.load(tmp_path / "b/mm_projector.bin", weights_only=True)
    assert all(torch.equal(first[k], second[k]) for k in first)
    other, _ = train_in_process(monkeypatch, capsys, mini, tmp_path / "c", "--seed", "4")
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_lora_run_leaves_the_heads_alone(monkeypatch, capsys, mini, tmp_path, train_module):
    argv = arguments(mini, tmp_path / "lora", "--use_cpu", "True", "--lora_enable", "True", "--lora_r", "4")
    argv[argv.index("--tune_mm_mlp_adapter") + 1] = "False"
    status, _, err = run_main(monkeypatch, capsys, *argv)
    assert status == 0, err
    targets = json.loads((tmp_path / "lora/adapter_config.json").read_text())["target_modules"]
    assert not {"visual", "text", "hacl_head"} & set(targets) and "q_proj" in targets
    assert (tmp_path / "lora/hacl_head.safetensors").exists()
    others = torch.load(tmp_path / "lora/non_lora_trainables.bin", weights_only=True)
    assert any("mm_projector" in n for n in others) and not any("hacl" in n for n in others)


@pytest.fixture
def llm_of_today(mini, tmp_path):
    return make_llm_of_today(mini, tmp_path / "llm")


def test_a_tokenizer_without_unk_and_bos_trains(monkeypatch, capsys, mini, tmp_path, llm_of_today, train_module):
    from hacl_llava.data import HaclCollator

    batches, collate = [], HaclCollator.__call__
    monkeypatch.setattr(HaclCollator, "__call__", lambda self, x: batches.append(collate(self, x)) or batches[-1])
    argv = arguments(
        mini, tmp_path / "out", "--use_cpu", "True", "--max_steps", "2", "--model_name_or_path", llm_of_today
    )
    status, out, err = run_main(monkeypatch, capsys, *argv)
    assert status == 0, err
    assert "has no <unk> to pad rows with, so '<|reserved_0|>' does" in out
    for batch in batches:
        assert (batch["input_ids"][:, 0] == 0).all() and (batch["input_ids"] == -200).any(
            1
        ).all()  # BOS, then the image
        assert (batch["labels"] != -100).any(1).all() and (batch["labels"][:, 0] == -100).all()
        assert (batch["attention_mask"] == (batch["input_ids"] != 3)).all()
    log = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    assert log[0]["loss_lm"] > 0 and log[0]["loss_i2t"] > 0


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(monkeypatch, capsys, mini, tmp_path, llm_of_today, train_module):
    config = json.loads((llm_of_today / "config.json").read_text())
    (llm_of_today / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    file = llm_of_today / "model.safetensors"
    tensors = {k: v[:100] if v.shape[0] == config["vocab_size"] else v for k, v in load_file(file).items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, {"format": "pt"})
    said = fails(monkeypatch, capsys, mini, tmp_path, "--model_name_or_path", llm_of_today)
    assert "and the model has 100 rows: the tokenizer of" in said and "is of a larger vocabulary" in said


def test_a_tokenizer_that_nothing_can_pad_is_named(monkeypatch, capsys, mini, tmp_path, llm_of_today, train_module):
    settings = json.loads((llm_of_today / "tokenizer_config.json").read_text())
    settings["additional_special_tokens"] = []
    (llm_of_today / "tokenizer_config.json").write_text(json.dumps(settings))
    tokens = json.loads((llm_of_today / "tokenizer.json").read_text())
    tokens["added_tokens"] = tokens["added_tokens"][:3]
    (llm_of_today / "tokenizer.json").write_text(json.dumps(tokens))
    said = fails(monkeypatch, capsys, mini, tmp_path, "--model_name_or_path", llm_of_today)
    assert "neither <unk> nor another special token to pad rows with" in said
