"""Proofs of the preference losses: TRL's own trainers in float64, exact masks, and what each loss is minimised by."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import preference_losses
from course_tokenizer import FOLDER as TOKENIZER_FOLDER
from llm_config import ModelConfig
from modern_llm_architectures import CausalLM
from preference_losses import (
    Pairs,
    ScalarModel,
    check_pairs,
    dpo_loss,
    ipo_loss,
    kto_kl,
    kto_loss,
    lay_out,
    orpo_loss,
    response_rewards,
    response_scores,
    reward_loss,
    score_pairs,
    sequence_log_probs,
    simpo_loss,
)

SIZES = {"d_model": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_head": 6, "d_ff": 40, "max_seq_len": 64}
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
CHOSEN = [[14, 15, 1], [16, 1], [17, 18, 19, 20, 1]]
REJECTED = [[21, 1], [22, 23, 24, 1], [25, 26, 1]]


def tiny(seed: int = 0, **changes) -> CausalLM:
    torch.manual_seed(seed)
    model = CausalLM(ModelConfig(vocab_size=31, pad_id=0, bos_id=2, eos_id=1, **(SIZES | changes)))
    return model.double().eval()


def random_pairs(n: int = 7, seed: int = 0) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    values = [-6 * torch.rand(n, generator=generator, dtype=torch.float64) - 1 for _ in range(4)]
    counts = [torch.randint(2, 9, (n,), generator=generator) for _ in range(2)]
    return Pairs(*values, *counts)


# Responses and their log-probabilities


def test_a_row_counts_its_response_and_its_end_and_nothing_else() -> None:
    rows = lay_out(PROMPTS, CHOSEN, pad_id=0)
    for row, (prompt, response) in enumerate(zip(PROMPTS, CHOSEN, strict=True)):
        assert rows.token_ids[row, : len(prompt) + len(response)].tolist() == prompt + response
        assert rows.token_ids[row, 1:][rows.mask[row]].tolist() == response
    assert rows.lengths.tolist() == [3, 2, 5]


def test_log_probabilities_equal_a_plain_softmax_token_by_token(parity, checked_shapes) -> None:
    model, rows = tiny(), lay_out(PROMPTS, CHOSEN, pad_id=0)
    with checked_shapes(preference_losses) as checked:
        ours, entropies = response_scores(model, rows, with_entropy=True)
        sequence_log_probs(model, rows)
    assert checked
    expected, entropy = torch.zeros_like(ours), torch.zeros_like(ours)
    for row, (prompt, response) in enumerate(zip(PROMPTS, CHOSEN, strict=True)):
        logits = model(torch.tensor([prompt + response]))[0]  # alone: no padding
        for place, token in enumerate(response, start=len(prompt) - 1):
            p = logits[place].softmax(dim=0)
            expected[row, place], entropy[row, place] = p[token].log(), -(p * p.log()).sum()
    parity("response_log_probs", "softmax of single rows", "output", ours, expected, 1e-10)
    parity("response_scores entropy", "softmax of single rows", "output", entropies, entropy, 1e-10)
    torch.testing.assert_close(sequence_log_probs(model, rows), expected.sum(dim=1))


def test_the_probabilities_of_all_responses_add_up_to_one() -> None:
    model = tiny()
    responses = [[first, second] for first in range(31) for second in range(31)]
    rows = lay_out([PROMPTS[0]] * len(responses), responses, pad_id=0)
    assert abs(sequence_log_probs(model, rows).exp().sum().item() - 1) < 1e-10


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        (PROMPTS, CHOSEN[:2], "3 prompts but 2 responses"),
        ([], [], "0 prompts"),
        ([[5], []], [[6], [7]], "row 1 has an empty prompt"),
        ([[5], [6]], [[6], []], "row 1 has an empty response"),
        ([[5], [1.5]], [[6], [7]], "row 1 holds ids that are no whole numbers"),
    ],
)
def test_rows_without_a_prompt_or_a_response_are_refused(prompts, responses, message) -> None:
    with pytest.raises(ValueError, match=message):
        lay_out(prompts, responses, pad_id=0)


# The losses, by hand and against TRL


def test_dpo_by_hand() -> None:
    """Margin ((-2) - (-3)) - ((-4) - (-3)) = 2; with beta 0.5 the loss is log(1 + 1/e)."""
    pairs = Pairs(*(torch.tensor([value]) for value in (-2.0, -4.0, -3.0, -3.0)), torch.tensor([2]), torch.tensor([2]))
    assert pairs.margin.item() == 2
    assert dpo_loss(pairs, 0.5).item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)
    assert ipo_loss(pairs, 0.5).item() == pytest.approx((2 - 1) ** 2, abs=1e-6)


def test_dpo_gradient_is_beta_times_how_wrong_the_implicit_reward_is() -> None:
    pairs = random_pairs()
    chosen, rejected = (value.clone().requires_grad_(True) for value in pairs[:2])
    dpo_loss(pairs._replace(chosen=chosen, rejected=rejected), 0.3).sum().backward()
    wrong = torch.sigmoid(-0.3 * pairs.margin)  # P(the implicit reward prefers the rejected one)
    torch.testing.assert_close(chosen.grad, -0.3 * wrong)
    torch.testing.assert_close(rejected.grad, 0.3 * wrong)


def test_ipo_stops_where_dpo_goes_on() -> None:
    margins = torch.linspace(0, 60, 61, dtype=torch.float64)
    zero, ones = torch.zeros_like(margins), torch.ones_like(margins)
    pairs = Pairs(margins, zero, zero, zero, ones, ones)
    assert (dpo_loss(pairs, 0.1).diff() < 0).all()
    assert margins[ipo_loss(pairs, 0.1).argmin()] == 5  # 1 / (2 beta)


def test_simpo_and_orpo_know_no_reference_and_simpo_no_length() -> None:
    pairs = random_pairs()
    other = pairs._replace(ref_chosen=pairs.ref_chosen - 3, ref_rejected=pairs.ref_rejected + 2)
    for loss in (lambda p: simpo_loss(p, 2.0, 0.5), lambda p: orpo_loss(p, 0.1)):
        torch.testing.assert_close(loss(pairs), loss(other), rtol=0, atol=0)
    assert not torch.equal(dpo_loss(pairs, 0.1), dpo_loss(other, 0.1))
    doubled = Pairs(*(2 * value for value in pairs))  # the same means, responses twice as long
    torch.testing.assert_close(simpo_loss(pairs, 2.0, 0.5), simpo_loss(doubled, 2.0, 0.5))


def test_simpo_equals_trl(parity) -> None:
    from trl.experimental.cpo import CPOTrainer

    settings = {"alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.7, "loss_type": "simpo", "label_smoothing": 0.0}
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), **settings)
    pairs = random_pairs()
    chosen, rejected = (value.clone().requires_grad_(True) for value in pairs[:2])
    ours = simpo_loss(pairs._replace(chosen=chosen, rejected=rejected), 2.0, 0.7)
    gradients = torch.autograd.grad(ours.sum(), (chosen, rejected))
    theirs, *_ = CPOTrainer.cpo_loss(trainer, chosen / pairs.n_chosen, rejected / pairs.n_rejected)
    parity("simpo_loss", "trl CPOTrainer.cpo_loss(simpo)", "output", ours, theirs, 1e-10)
    wanted = torch.autograd.grad(theirs.sum(), (chosen, rejected))
    parity("simpo_loss", "trl CPOTrainer.cpo_loss(simpo)", "gradient", gradients, wanted, 1e-10)


def test_orpo_equals_trl(parity) -> None:
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=0.3)  # TRL casts to float32
    pairs = random_pairs()
    means = pairs.per_token()
    theirs, *_ = ORPOTrainer.odds_ratio_loss(trainer, means.chosen, means.rejected)
    parity("orpo_loss", "trl ORPOTrainer", "output", orpo_loss(pairs, 0.3) + means.chosen, -theirs, 1e-6)


def test_orpo_is_finite_where_both_answers_are_nearly_certain() -> None:
    """log(1 - p) of p = 1 - 1e-9 is -20.7 and not -inf, as float32 has it: the gradient of what is likelier remains."""
    chosen, rejected = (torch.tensor([-value], requires_grad=True) for value in (1e-9, 3e-9))
    one = torch.ones(1)
    loss = orpo_loss(Pairs(chosen, rejected, 0 * one, 0 * one, one, one), 0.3)
    assert loss.item() == pytest.approx(0.3 * math.log(1 + 1 / 3), rel=1e-4)  # the odds are as 3 to 1
    assert all(torch.isfinite(slope).all() for slope in torch.autograd.grad(loss, (chosen, rejected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_orpo_of_answers_that_are_certain_is_a_draw_and_no_nan(dtype: torch.dtype) -> None:
    """A probability that rounds to 1 has log-probability 0."""
    chosen, rejected = (torch.zeros(1, dtype=dtype, requires_grad=True) for _ in range(2))
    one = torch.ones(1, dtype=dtype)
    loss = orpo_loss(Pairs(chosen, rejected, 0 * one, 0 * one, one, one), 0.3)
    assert loss.item() == pytest.approx(0.3 * math.log(2), rel=1e-2)
    assert all(torch.isfinite(slope).all() for slope in torch.autograd.grad(loss.sum(), (chosen, rejected)))


@pytest.fixture(scope="module")
def trl_folder(tmp_path_factory):
    """A tiny Llama with the course tokenizer, as a folder that transformers and ours load."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_FOLDER)
    torch.manual_seed(0)
    CausalLM(
        ModelConfig(len(tokenizer), pad_id=tokenizer.pad_token_id, eos_id=tokenizer.eos_token_id, bos_id=1, **SIZES)
    ).save_pretrained(folder)
    return folder, tokenizer


def perturbed(folder):
    """TRL's policy in float64, moved away from the reference, and ours with the same weights."""
    from transformers import LlamaForCausalLM

    theirs, generator = LlamaForCausalLM.from_pretrained(folder), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(folder / "moved")
    return theirs.double(), CausalLM.from_pretrained(folder / "moved").double()


SETTINGS = {
    **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [], "save_strategy": "no"},
    **{"disable_tqdm": True, "per_device_train_batch_size": 3, "max_steps": 1, "max_length": 64},
}
PAIRED = [
    {"prompt": "What is 2 plus 3 ?", "chosen": " It is 5 .", "rejected": " No , it is 7 , I think ."},
    {"prompt": "Sort 4 1 .", "chosen": " 1 4 .", "rejected": " 4 1 ."},
    {"prompt": "Where is the lamp now ?", "chosen": " It is in the old hall .", "rejected": " It is lost ."},
]


def split_rows(ids: torch.Tensor, completion: torch.Tensor, attention: torch.Tensor):
    """TRL's batch as our prompts and responses: the ids before the completion, and the completion."""
    rows = [
        (row[real.bool()], counted[real.bool()]) for row, counted, real in zip(ids, completion, attention, strict=True)
    ]
    prompts = [row[counted == 0].tolist() for row, counted in rows]
    return lay_out(prompts, [row[counted == 1].tolist() for row, counted in rows], pad_id=0)


def compare_gradients(parity, name: str, oracle: str, ours: CausalLM, theirs) -> None:
    pairs = {
        "token_emb.weight": theirs.model.embed_tokens.weight,
        "blocks.0.self_attn.k_proj.weight": theirs.model.layers[0].self_attn.k_proj.weight,
        "blocks.1.ffn.down_proj.weight": theirs.model.layers[1].mlp.down_proj.weight,
    }
    got, wanted = dict(ours.named_parameters()), {}
    # transformers computes the rotary table in float32 whatever the weights are: a whole model in part single precision
    for key, weight in pairs.items():
        wanted[key] = weight.grad
        assert wanted[key].abs().max() > 1e-3
    parity(name, oracle, "gradient", {key: got[key].grad for key in pairs}, wanted, 1e-5)


@pytest.mark.parametrize(("loss_type", "loss"), [("sigmoid", dpo_loss), ("ipo", ipo_loss)])
def test_dpo_and_ipo_equal_trl(loss_type, loss, trl_folder, parity, tmp_path) -> None:
    """TRL's IPO divides each log ratio by its number of tokens, which the paper's equation 17 does not."""
    from datasets import Dataset
    from transformers import LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    folder, tokenizer = trl_folder
    config = DPOConfig(output_dir=str(tmp_path), beta=0.3, loss_type=[loss_type], **SETTINGS)
    theirs, ours = perturbed(folder)
    reference = LlamaForCausalLM.from_pretrained(folder).double()
    trainer = DPOTrainer(
        theirs, ref_model=reference, args=config, train_dataset=Dataset.from_list(PAIRED), processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    wanted = trainer.compute_loss(trainer.model, dict(batch))
    wanted.backward()
    rows = split_rows(batch["input_ids"], batch["completion_mask"], batch["attention_mask"])
    chosen, rejected = (
        rows._replace(token_ids=rows.token_ids[part], mask=rows.mask[part]) for part in (slice(3), slice(3, 6))
    )
    pairs = score_pairs(ours, CausalLM.from_pretrained(folder).double(), chosen, rejected)
    got = loss(pairs.per_token() if loss_type == "ipo" else pairs, 0.3).mean()
    got.backward()
    name = f"{loss_type.replace('sigmoid', 'dpo')}_loss"
    parity(name, "trl DPOTrainer", "output", got, wanted, 1e-6)
    compare_gradients(parity, name, "trl DPOTrainer", ours, theirs)


def test_kto_equals_trl(trl_folder, parity, tmp_path) -> None:
    from datasets import Dataset
    from transformers import LlamaForCausalLM
    from trl import KTOConfig, KTOTrainer

    folder, tokenizer = trl_folder
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": n != 1} for n, row in enumerate(PAIRED)]
    config = KTOConfig(
        output_dir=str(tmp_path), beta=0.3, desirable_weight=1.0, undesirable_weight=1.0, loss_type="kto", **SETTINGS
    )
    theirs, ours = perturbed(folder)
    reference = LlamaForCausalLM.from_pretrained(folder).double()
    trainer = KTOTrainer(
        theirs, ref_model=reference, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    wanted = trainer.compute_loss(trainer.model, dict(batch))
    wanted.backward()
    ours_ref = CausalLM.from_pretrained(folder).double()

    def log_ratios(prefix: str) -> torch.Tensor:
        names = (f"{prefix}input_ids", f"{prefix}completion_mask", f"{prefix}attention_mask")
        asked = split_rows(*(batch[name] for name in names))
        return sequence_log_probs(ours, asked) - sequence_log_probs(ours_ref, asked).detach()

    kl = kto_kl(log_ratios("KL_"))
    got = kto_loss(log_ratios(""), batch["label"].bool(), kl, 0.3).mean()
    got.backward()
    parity("kto_loss", "trl KTOTrainer", "output", got, wanted, 1e-6)
    compare_gradients(parity, "kto_loss", "trl KTOTrainer", ours, theirs)


# The reward model


def test_reward_model_equals_trl(trl_folder, parity, tmp_path) -> None:
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    folder, tokenizer = trl_folder
    config = RewardConfig(output_dir=str(tmp_path), center_rewards_coefficient=None, **SETTINGS)
    theirs = LlamaForSequenceClassification.from_pretrained(folder, num_labels=1).double()
    theirs.config.pad_token_id = tokenizer.pad_token_id
    trainer = RewardTrainer(theirs, args=config, train_dataset=Dataset.from_list(PAIRED), processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    real = batch["attention_mask"].bool()
    wanted = trainer.compute_loss(trainer.model, dict(batch))
    wanted.backward()
    ours = ScalarModel(CausalLM.from_pretrained(folder)).double()
    with torch.no_grad():
        ours.head.weight.copy_(theirs.score.weight)
    rows = [row[kept].tolist() for row, kept in zip(batch["input_ids"], real, strict=True)]
    rewards = response_rewards(ours, lay_out([row[:1] for row in rows], [row[1:] for row in rows], pad_id=0))
    got = reward_loss(*rewards.chunk(2)).mean()
    got.backward()
    parity("reward_loss of ScalarModel", "trl RewardTrainer", "output", got, wanted, 1e-6)
    parity("ScalarModel", "trl RewardTrainer", "gradient", ours.head.weight.grad, theirs.score.weight.grad, 1e-6)


def test_a_new_reward_model_calls_every_pair_a_draw_and_learns_one_batch() -> None:
    model = ScalarModel(copy.deepcopy(tiny()))
    chosen, rejected = lay_out(PROMPTS, CHOSEN, 0), lay_out(PROMPTS, REJECTED, 0)
    losses, optimizer = [], torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        loss = reward_loss(response_rewards(model, chosen), response_rewards(model, rejected)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < 0.05


def test_a_reward_reads_the_last_token_of_its_own_response_whatever_stands_behind() -> None:
    torch.manual_seed(0)
    model = ScalarModel(tiny())
    torch.nn.init.normal_(model.head.weight)
    together = response_rewards(model, lay_out(PROMPTS, CHOSEN, 0))
    alone = [response_rewards(model, lay_out([p], [r], 0)) for p, r in zip(PROMPTS, CHOSEN, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone))
    cut = response_rewards(model, lay_out(PROMPTS, [response[:-1] or [3] for response in CHOSEN], 0))
    assert not torch.isclose(together, cut).any()  # the end token is read


def test_bradley_terry_loss_is_that_of_a_coin_with_the_difference_for_log_odds() -> None:
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3.0])
    p = torch.sigmoid(chosen - rejected)
    torch.testing.assert_close(
        reward_loss(chosen, rejected), F.binary_cross_entropy(p, torch.ones(2), reduction="none")
    )
    torch.testing.assert_close(reward_loss(chosen, rejected, margin=0.5), reward_loss(chosen - 0.5, rejected))


# Pairs


def test_no_gradient_reaches_the_reference() -> None:
    model, reference = tiny(0), tiny(1)
    pairs = score_pairs(model, reference, lay_out(PROMPTS, CHOSEN, 0), lay_out(PROMPTS, REJECTED, 0))
    dpo_loss(pairs, 0.1).sum().backward()
    assert all(parameter.grad is None for parameter in reference.parameters())
    assert model.token_emb.weight.grad.abs().sum() > 0


def test_a_policy_that_is_its_own_reference_has_margin_zero_and_loss_log_two() -> None:
    model = tiny()
    pairs = score_pairs(model, copy.deepcopy(model), lay_out(PROMPTS, CHOSEN, 0), lay_out(PROMPTS, REJECTED, 0))
    torch.testing.assert_close(pairs.margin, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(dpo_loss(pairs, 0.1), torch.full((3,), math.log(2), dtype=torch.float64))


def test_kto_pushes_good_up_and_bad_down_from_its_reference_point() -> None:
    log_ratios = torch.tensor([1.0, 1.0, -2.0], requires_grad=True)
    losses = kto_loss(log_ratios, torch.tensor([True, False, False]), torch.tensor(0.5), 0.4)
    assert losses[0] < 0.5 < losses[1] and losses[2] < 0.5
    losses.sum().backward()
    assert log_ratios.grad[0] < 0 < log_ratios.grad[1]
    point = kto_kl(torch.tensor([1.0, 3.0], requires_grad=True))
    assert kto_kl(torch.tensor([-1.0, -3.0])) == 0 and point == 2 and not point.requires_grad


def test_a_pair_of_equal_responses_is_refused_by_its_number() -> None:
    with pytest.raises(ValueError, match="pair 1: chosen and rejected are the same response"):
        check_pairs(lay_out(PROMPTS, CHOSEN, 0), lay_out(PROMPTS, [REJECTED[0], CHOSEN[1], REJECTED[2]], 0))
    with pytest.raises(ValueError, match="pair 0: chosen and rejected are the same response"):
        score_pairs(tiny(), tiny(), lay_out(PROMPTS, CHOSEN, 0), lay_out(PROMPTS, CHOSEN, 0))


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_a_beta_that_is_not_positive_is_refused(beta) -> None:
    pairs = random_pairs()
    for loss in (
        lambda: dpo_loss(pairs, beta),
        lambda: ipo_loss(pairs, beta),
        lambda: simpo_loss(pairs, beta, 0.5),
        lambda: kto_loss(pairs.margin, pairs.margin > 0, torch.tensor(0.0), beta),
    ):
        with pytest.raises(ValueError, match=f"dpo_beta must be > 0, got {beta}"):
            loss()
