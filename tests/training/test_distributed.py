"""Engines: what each process does, what they agree on, and settings of the engines that need several of them.

Whole runs under each engine are in test_engines.py.
"""

import time
from itertools import count, repeat
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, launched, losses
from mimkit.recipes import mae_hivit
from short_runs import TINY, run
from torch import nn

from mimkit.errors import UserError
from mimkit.training import distributed, heartbeat
from mimkit.training.distributed import Engine, block_types, compile_network, end_with_launcher, requested_engine

ENGINES = {file.stem: file for file in sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))}


def test_each_engine_has_a_file():
    assert set(ENGINES) == {"cpu", "ddp", "fsdp2", "zero2", "zero3"}
    for file in ENGINES.values():
        assert "mixed_precision" not in yaml.safe_load(file.read_text())  # --precision sets it


@pytest.mark.two_processes
def test_two_processes_are_one_run(images, tmp_path):
    """Two data-parallel processes train a tiny HiViT, and give the losses of one process."""
    argv = ["--data", images, *TINY, "--epochs", "2", "--save-every", "0.5", "--knn-every", "0"]
    printed = launched(2, "mae_hivit", *argv, "--out", tmp_path / "two")
    assert "8 = 4 images x 2 processes" in printed
    assert printed.count("configured mean") == 1  # one of them prints
    run(mae_hivit, *argv, "--out", tmp_path / "one")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(one) == [2, 4, 6, 8]
    assert two == pytest.approx(one, abs=1e-4)


# One process ---------------------------------------------------------------------------------------------------------


def test_one_process_is_an_engine():
    engine = Engine()
    assert str(engine) == "one process"
    assert (engine.rank, engine.world_size, engine.is_main, engine.device.type) == (0, 1, True, "cpu")
    assert not any((engine.zero_stage, engine.is_fsdp, engine.sharded_checkpoint, engine.sharded_params))
    assert engine.any(True)
    assert not engine.any(False)
    assert engine.reduce(torch.tensor(3.0)) == 3
    assert engine.sum(torch.tensor(3), torch.tensor([1.0, 2.0]))[1].tolist() == [1, 2]
    assert engine.gradient_norm() is None
    engine.wait()


def test_the_main_process_decides():
    engine = Engine()
    assert engine.on_main(lambda a, b: a + b, 1, 2) == 3
    assert engine.on_main(lambda: None) is None

    def fail():
        raise UserError("wrong")

    with pytest.raises(UserError, match=r"^wrong$"):
        engine.on_main(fail)


def test_other_processes_learn_what_the_main_one_decided(monkeypatch):
    """They do not call the function, but raise its error."""
    engine, called = Engine(), []
    for sent in ([5, None], [None, "wrong"]):
        monkeypatch.setattr(engine, "is_main", False)
        monkeypatch.setattr(
            "accelerate.utils.broadcast_object_list", lambda found, sent=sent: found.__setitem__(slice(2), sent)
        )
        if sent[1]:
            with pytest.raises(UserError, match=r"^wrong$"):
                engine.on_main(called.append, 1)
        else:
            assert engine.on_main(called.append, 1) == 5
    assert not called


def test_generators_are_seeded_by_seed_step_and_rank():
    engine = Engine()

    def drawn(*key):
        engine.seed(*key)
        return torch.rand(()).item(), np.random.rand()

    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**40, 0, 0)]
    found = [drawn(*key) for key in keys]
    assert found == [drawn(*key) for key in keys]
    assert len({number for pair in found for number in pair}) == 10
    assert drawn(0, 0) == found[0]  # its own rank by default


# Choosing an engine --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, "NO"),
        ({"WORLD_SIZE": "1"}, "NO"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MULTI_CPU"),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "MULTI_CPU"),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, "FSDP"),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}, "DEEPSPEED"),
    ],
)
def test_the_launcher_names_the_engine(environment, name, monkeypatch):
    monkeypatch.setattr(distributed, "on_cpu", lambda: True)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert requested_engine() == name
    monkeypatch.setattr(distributed, "on_cpu", lambda: False)
    assert requested_engine() == name.replace("CPU", "GPU")


def test_another_engine_than_the_requested_one_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "requested_engine", lambda: "FSDP")
    with pytest.raises(
        UserError, match=r"asked for FSDP, but one process is running. FSDP needs GPUs; recipes/accelerate"
    ):
        Engine()


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        (
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            {"precision": "fp16"},
            "fp16 cannot be guarded under DeepSpeed, which sk",
        ),
        ({}, {"precision": "fp8"}, r"accelerate cannot start \(.*\). Check --precision fp8 and the launch command."),
        (
            {},
            {"track": "nothing"},
            "--track nothing is not installed. Run pip install mimkit.track., or omit the option",
        ),
    ],
    ids=["fp16 under DeepSpeed", "fp8 without its libraries", "no tracker"],
)
def test_what_cannot_start_is_one_sentence(environment, options, message, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=message):
        Engine(**options)


def test_only_launched_processes_end_with_their_launcher(monkeypatch):
    called = []
    library = SimpleNamespace(prctl=lambda *argv: called.append(argv))
    monkeypatch.setattr(distributed.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(distributed.sys, "platform", "linux")
    end_with_launcher()
    assert not called
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    end_with_launcher()
    assert called == [(1, 9)]


# Preparing a model ---------------------------------------------------------------------------------------------------


class LineBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(1, 1)

    def forward(self, x):
        return self.line(x)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(LineBlock(), LineBlock())
        self.head = nn.Linear(1, 1)
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x):
        return self.head(self.blocks(x))


def test_blocks_are_known_by_their_name():
    assert block_types(Network()) == {LineBlock}


def test_a_model_is_compiled_as_a_whole_or_block_by_block(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    whole, blocks = Network(), Network()
    compile_network(whole, block_by_block=False)
    assert len(compiled) == 1
    assert whole._compiled_call_impl is not None
    with torch._dynamo.config.patch(recompile_limit=1):
        compile_network(blocks, block_by_block=True)
        assert torch._dynamo.config.recompile_limit == 2  # beyond it, blocks would run uncompiled
    assert compiled[1:] == [{"dynamic": False}] * 2
    assert blocks._compiled_call_impl is None


def test_the_complete_weights_of_a_sharded_model(monkeypatch):
    """Of shards that know their complete tensors, as FSDP2's do."""
    monkeypatch.setattr(Engine, "sharded_params", True)
    engine, model = Engine(), Network()
    engine.prepare(model, torch.optim.SGD(model.parameters()), micro_batch_size=1)
    for number, parameter in enumerate(model.parameters()):
        parameter.full_tensor = torch.full_like(parameter, number).clone
    model.mean.fill_(5.0)
    for module in (model, model.head, model.blocks[1]):
        full = engine.full_state(module)
        assert full is not module
        assert type(full) is type(module)
    full = engine.full_state(model)
    assert [parameter.item() for parameter in full.parameters()] == [0, 1, 2, 3, 4, 5]
    assert full.mean == 5
    assert not any(parameter.requires_grad for parameter in full.parameters())
    assert engine.full_state(model.head) is full.head
    other = nn.Linear(1, 1)
    assert engine.full_state(other) is other


def test_a_model_that_is_not_sharded_is_complete():
    engine, model = Engine(), Network()
    assert engine.full_state(model) is model  # also before it is prepared
    prepared, _ = engine.prepare(model, torch.optim.SGD(model.parameters()), micro_batch_size=1)
    assert engine.full_state(model.head) is model.head
    assert prepared is model


def prepare_with_deepspeed(stage, precision="fp32", optimizer=torch.optim.AdamW, **options):
    """Prepare a model with an engine that takes DeepSpeed's settings. -> the engine and the settings"""
    engine, model, plugin = Engine(), Network(), SimpleNamespace(zero_stage=stage, deepspeed_config={})
    kind, state = SimpleNamespace(name="DEEPSPEED"), SimpleNamespace(deepspeed_plugin=plugin)
    engine.precision, engine.world_size = precision, 2
    engine.accelerator = SimpleNamespace(distributed_type=kind, state=state, prepare=lambda *parts: parts)
    engine.prepare(model, optimizer(model.parameters()), micro_batch_size=4, **options)
    return engine, plugin.deepspeed_config


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeed_gets_the_settings_that_it_cannot_infer(stage):
    engine, config = prepare_with_deepspeed(stage)
    assert config == {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.0}
    assert str(engine) == f"ZeRO-{stage}, 2 processes"
    assert (engine.sharded_checkpoint, engine.sharded_params) == (True, False)
    config = prepare_with_deepspeed(stage, "bf16", clip_grad=2.0)[1]
    assert config["gradient_clipping"] == 2.0
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}


def test_an_optimizer_that_needs_complete_weights_is_refused():
    class Lars(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

    with pytest.raises(
        UserError, match=r"Lars needs complete weights, but ZeRO gives it shards. Launch with ddp.yaml."
    ):
        prepare_with_deepspeed(2, optimizer=Lars)


def test_deepspeed_knows_the_norm_of_a_complete_step():
    engine = Engine()
    wrapped = SimpleNamespace(engine=SimpleNamespace(get_global_grad_norm=lambda: 2.5))
    engine.accelerator.deepspeed_engine_wrapped = wrapped
    assert engine.gradient_norm() == 2.5
    engine.accelerator.gradient_state._set_sync_gradients(False)
    assert engine.gradient_norm() is None


# Heartbeat -----------------------------------------------------------------------------------------------------------


class Store(dict):
    """torch's store in one process. The other process answers with the next of these turns."""

    def __init__(self, turns):
        self.turns = turns

    def clone(self):
        return self

    def set(self, key, value):
        self[key] = value

    def get(self, key):
        assert key == "mimkit/alive/1"
        return next(self.turns).encode()


@pytest.fixture
def beat(monkeypatch):
    """Start the heartbeat of the first of two processes. -> the store, the heartbeat, and the codes it ended with"""
    monkeypatch.setattr(heartbeat, "BEAT", 0.02)
    monkeypatch.setattr(heartbeat, "MISSED", 25)
    monkeypatch.setattr(torch.distributed, "barrier", lambda group: None)
    codes, started = [], []

    def end(code):
        codes.append(code)
        started[0].finished.set()

    def start(turns):
        store = Store(turns)
        monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: store)
        started.append(heartbeat.Heartbeat(0, 2, None))
        return store, started[0], codes

    monkeypatch.setattr(heartbeat, "os", SimpleNamespace(_exit=end))
    yield start
    started[0]._end()


def test_a_process_that_is_silent_ends_the_run(beat, capsys):
    store, beats, codes = beat(repeat("7"))
    assert beats.finished.wait(60)
    assert codes == [2]
    message = "Another process of this run ended or cannot be reached (no sign of life from process 1 for 0 seconds)"
    assert f"mimkit: {message}" in capsys.readouterr().err
    assert store["mimkit/alive/0"] != "0"


@pytest.mark.parametrize("turns", [map(str, count()), repeat(heartbeat.ENDED)], ids=["alive", "ended in good order"])
def test_a_process_that_is_not_silent_is_left_alone(turns, beat):
    store, beats, codes = beat(turns)
    time.sleep(0.8)
    beats._end()
    assert not codes
    assert store["mimkit/alive/0"] == heartbeat.ENDED
