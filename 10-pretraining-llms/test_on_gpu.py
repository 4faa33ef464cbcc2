"""Topics 01-10 on a GPU: what the other tests prove on the CPU must hold there too. Skipped where there is no GPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from building_from_scratch import ModelConfig as TranslatorConfig
from building_from_scratch import Transformer
from checkpoints import Checkpoints
from course_model import (
    FOLDER,
    REPORT,
    ExamConfig,
    ModelSizes,
    PretrainConfig,
    SourceConfig,
    draw_samples,
    gaps_by_kind,
    load_course_model,
    pretrain_model,
)
from gpt2 import SamplingConfig
from tiny_world import World
from workbench import ROOT, RunConfig

DEVICE = os.environ.get("COURSE_GPU", "cuda")  # any other device lets these tests run to test themselves
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no GPU")

SIZES = ModelSizes(d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=96)
SOURCE = SourceConfig(n_documents=2000)
SHORT = PretrainConfig(max_steps=30, seq_len=80, warmup_steps=5, cooldown_steps=10, eval_every=0, log_every=1)


@pytest.fixture(scope="module")
def course():
    model, tokenizer = load_course_model()
    return model.to(DEVICE).eval(), tokenizer


def pretrained(config: PretrainConfig, out, device: str = DEVICE):
    model, _, _, log = pretrain_model(SIZES, SOURCE, config, RunConfig(device=device, out=out))
    return model, log


def test_the_course_model_reaches_its_card_on_the_gpu(course, parity) -> None:
    model, tokenizer = course
    report = json.loads((FOLDER / REPORT).read_text(encoding="utf-8"))
    documents = World().documents(report["exam"]["n_held_out"], report["exam"]["exam_seed"], "validation")
    found = gaps_by_kind(model, tokenizer, documents)
    for kind, (floor, gap, _) in report["gaps"].items():
        parity(f"course model on a GPU, {kind}", "its model card", "output", found[kind][:2], (floor, gap), 1e-4)


def test_logits_and_greedy_tokens_are_those_of_transformers_and_of_the_cpu(course, parity) -> None:
    model, _ = course
    theirs = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).to(DEVICE).eval()
    cpu = load_course_model()[0].eval()
    rows = torch.randint(20, 2000, (5, 37), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = model(rows.to(DEVICE))
        parity("CausalLM on a GPU", "transformers on the GPU", "output", logits, theirs(rows.to(DEVICE)).logits, 1e-4)
        parity("CausalLM on a GPU", "CausalLM on the CPU", "output", logits.cpu(), cpu(rows), 1e-3)
    greedy = SamplingConfig(40, temperature=0.0)
    assert torch.equal(model.generate(rows.to(DEVICE), greedy).cpu(), cpu.generate(rows, greedy))


def test_one_seed_draws_the_same_documents_on_both(course) -> None:
    model, tokenizer = course
    config = ExamConfig(n_held_out=2, n_questions=2, n_samples=40)
    here, there = (draw_samples(chosen, tokenizer, config) for chosen in (load_course_model()[0].eval(), model))
    assert sum(a == b for a, b in zip(here, there, strict=True)) >= 38  # rounding may turn a choice, rarely


def test_training_on_the_gpu_follows_the_cpu(tmp_path, parity) -> None:
    places = {"here": "cpu", "there": DEVICE}
    losses = [[row["loss"] for row in pretrained(SHORT, tmp_path / at, places[at])[1]] for at in places]
    parity("fit on a GPU", "fit on the CPU", "trajectory", losses[1][:10], losses[0][:10], 1e-3)
    parity("fit on a GPU", "fit on the CPU, 30 steps", "trajectory", losses[1], losses[0], 3e-2)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(dtype, tmp_path, parity) -> None:
    config = replace(SHORT, dtype=dtype, save_every=10, keep_last=9)
    whole, log = pretrained(config, tmp_path)
    for later in (30, 20):
        Checkpoints(tmp_path).remove(later)
    again, log_again = pretrained(replace(config, resume=True), tmp_path)
    weights = [dict(model.named_parameters()) for model in (again, whole)]
    parity(f"resume on a GPU, {dtype}", "the run that never stopped", "trajectory", *weights, 0.0)
    assert log_again == log and log[-1]["loss"] < log[0]["loss"]


def test_low_precision_trains_like_fp32(tmp_path) -> None:
    ends = {}
    for dtype in ("fp32", "bf16", "fp16"):
        _, log = pretrained(replace(SHORT, dtype=dtype, max_steps=200, cooldown_steps=100), tmp_path / dtype)
        ends[dtype] = sum(row["loss"] for row in log[-10:]) / 10
    assert abs(ends["bf16"] - ends["fp32"]) < 0.05 and abs(ends["fp16"] - ends["fp32"]) < 0.05, ends


def test_a_translator_computes_the_same_there(parity) -> None:
    model = Transformer(TranslatorConfig(d_model=24, n_heads=3, d_ff=40, n_decoder_layers=3), 31, 29).eval()
    source, target = torch.randint(4, 29, (3, 11)), torch.randint(4, 29, (3, 7))
    with torch.no_grad():
        here = model(source, target)
        there = model.to(DEVICE)(source.to(DEVICE), target.to(DEVICE)).cpu()
    parity("Transformer on a GPU", "Transformer on the CPU", "output", there, here, 1e-4)


def test_torchrun_trains_on_a_gpu_by_nccl(tmp_path) -> None:
    """NCCL gives each process a GPU of its own, so as many are started as there are; with one, it is a team of one."""
    n_gpus = max(1, torch.cuda.device_count())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_gpus)]
    script = ROOT / "10-pretraining-llms" / "pretraining_llms.py"
    sizes = [
        "--n-documents",
        "2000",
        "--max-steps",
        "12",
        "--warmup-steps",
        "2",
        "--cooldown-steps",
        "4",
        "--n-held-out",
        "20",
    ]
    exam = ["--n-questions", "4", "--n-samples", "4", "--device", DEVICE, "--out", str(tmp_path)]
    done = subprocess.run([*command, script, "pretrain", *sizes, *exam], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "model" / REPORT).exists()


def test_packed_documents_do_not_see_each_other_there(course, parity) -> None:
    model, tokenizer = course
    documents = [tokenizer.encode_document(document).ids for document in World().documents(3, 5)]
    row = torch.tensor([sum(documents, [])], device=DEVICE)
    numbers = torch.tensor([[index for index, ids in enumerate(documents) for _ in ids]], device=DEVICE)
    with torch.no_grad():
        packed = model(row, document_ids=numbers)[0]
        alone = torch.cat([model(torch.tensor([ids], device=DEVICE))[0] for ids in documents])
    parity("packed rows on a GPU", "each document alone", "invariant", packed, alone, 1e-4)
