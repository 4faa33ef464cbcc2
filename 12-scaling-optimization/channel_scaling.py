"""Topic 12 - Channel scaling: move size between activations and weights before rounding; AWQ and SmoothQuant.

    statistics = input_statistics(model, batches)
    awq(model, statistics, QuantFormat(3, 32))             # protects the weights that meet large inputs
    smooth(model, statistics, strength=0.5)                # takes the peaks out of the inputs
    plant_outliers(model, 30.0, [5, 40])                   # the same function with the outliers of large models

A channel of the inputs may be divided by s if the matching column of every weight that reads it is multiplied by s:
nothing changes but what rounding sees. Xiao et al. 2022 (SmoothQuant, arXiv 2211.10438), Lin et al. 2023 (AWQ, arXiv
2306.00978), Dettmers et al. 2022 (outliers, arXiv 2208.07339).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gptq import InputStatistics, output_error
from modern_llm_architectures import CausalLM
from weight_quantization import QuantFormat, quantise


class Site(NamedTuple):
    """A place where channels may be scaled: what makes them, and the linear layers that read them.

    `tied` counts how many runs of `width` channels share one maker's channel, as query heads share a value head; the
    scales must then agree between them.
    """

    maker: nn.Module
    readers: dict[str, nn.Linear]
    tied: int = 1
    width: int = 1


def scaling_sites(model: CausalLM) -> Iterator[Site]:
    """The four places of every block: norm to q, k, v; v to out; norm to gate and up; up to down.

    Raises ValueError for a block that is not grouped-query attention with SwiGLU.
    """
    for layer, block in enumerate(model.blocks):
        attention, ffn = block.self_attn, block.ffn
        if not hasattr(attention, "v_proj") or not hasattr(ffn, "up_proj"):
            raise ValueError(f"block {layer} is not grouped-query attention with SwiGLU; its channels are not known")
        names = {module: name for name, module in model.named_modules()}

        def linears(*found: nn.Linear, names: dict = names) -> dict[str, nn.Linear]:
            return {names[module]: module for module in found}

        share = attention.n_heads // attention.n_kv_heads
        yield Site(block.attn_norm, linears(attention.q_proj, attention.k_proj, attention.v_proj))
        yield Site(attention.v_proj, linears(attention.out_proj), share, attention.d_head)
        yield Site(block.ffn_norm, linears(ffn.gate_proj, ffn.up_proj))
        yield Site(ffn.up_proj, linears(ffn.down_proj))


def agreed(values: Tensor, site: Site) -> Tensor:
    """One value for each channel that the maker has: the largest of those that share it. (columns) to (channels).

    With grouped queries, heads 0 and 1 of 4 read value head 0: (kv_heads, sharing, d_head) in the order of columns.
    """
    return values.unflatten(0, (-1, site.tied, site.width)).amax(1).flatten() if site.tied > 1 else values


def for_readers(scales: Tensor, site: Site) -> Tensor:
    """The scales of the maker's channels, repeated for the columns that read them: (channels) to (columns)."""
    if site.tied == 1:
        return scales
    return scales.unflatten(0, (-1, 1, site.width)).expand(-1, site.tied, -1).flatten()


@torch.no_grad()
def scale_channels(site: Site, scales: Tensor) -> None:
    """Divide the maker's channels by `scales` and multiply the readers' columns: the function stays what it was.

    Shapes: scales (channels), all > 0.
    """
    for parameter in (site.maker.weight, getattr(site.maker, "bias", None)):
        if parameter is not None:
            shape = (-1,) + (1,) * (parameter.dim() - 1)
            parameter /= scales.to(parameter).reshape(shape)
    for reader in site.readers.values():
        reader.weight *= for_readers(scales, site).to(reader.weight)


# AWQ: which scales cost the least error of the outputs


def centred(scales: Tensor) -> Tensor:
    """Scales around 1: divided by the geometric mean of the largest and the smallest."""
    return scales / (scales.max() * scales.min()).sqrt()


def awq_scales(
    site: Site, statistics: dict[str, InputStatistics], round_weights: Callable[[Tensor], Tensor], n_grid: int = 20
) -> tuple[Tensor, float]:
    """The best s = mean|x|^alpha for alpha in 0, 1/n_grid, ..., and that alpha (Lin et al. 2023, equation 4).

    Best is the smallest squared error of the readers' outputs; alpha = 0 is rounding to nearest, so no site gets worse
    on the calibration. `round_weights(weight)` gives the weights that will be stored.
    """
    first = statistics[next(iter(site.readers))]
    size = agreed(first.mean_abs.clamp(min=1e-8), site)  # (channels)
    best, chosen = torch.ones_like(size), (float("inf"), 0.0)
    for alpha in (step / n_grid for step in range(n_grid)):
        scales = centred(size**alpha)  # (channels)
        columns = for_readers(scales, site).float()  # (columns)
        error = 0.0
        for name, reader in site.readers.items():
            rounded = round_weights(reader.weight.float() * columns) / columns
            error += output_error(reader.weight, rounded, statistics[name].second_moment) * len(reader.weight)
        if error < chosen[0]:
            best, chosen = scales, (error, alpha)
    return best, chosen[1]


@torch.no_grad()
def awq(
    model: CausalLM, statistics: dict[str, InputStatistics], fmt: QuantFormat, n_grid: int = 20
) -> list[tuple[str, float]]:
    """Scale every site of a model by its best scales, in place; round to nearest afterwards.

    Returns the exponents chosen, by the first reader of each site. The weights that follow see the second moments of
    the calibration in the old channels, so each site is judged before its own scaling.
    """
    chosen = []
    for site in scaling_sites(model):
        scales, alpha = awq_scales(site, statistics, lambda weight: quantise(weight, fmt).dequantise(), n_grid)
        scale_channels(site, scales)
        chosen.append((next(iter(site.readers)), alpha))
    return chosen


# SmoothQuant: the peaks of the inputs shared with the weights


@torch.no_grad()
def smooth(model: CausalLM, statistics: dict[str, InputStatistics], strength: float = 0.5) -> None:
    """s = max|x|^strength / max|w|^(1 - strength) at every site, in place (Xiao et al. 2022, equation 4).

    strength 1 makes all input channels equally large, 0 all weight columns. Raises ValueError outside 0..1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in 0..1, got {strength}")
    for site in scaling_sites(model):
        peaks = agreed(statistics[next(iter(site.readers))].max_abs, site).clamp(min=1e-5)  # (*)
        columns = torch.stack([reader.weight.abs().amax(0).double() for reader in site.readers.values()]).amax(0)
        weights = agreed(columns, site).clamp(min=1e-5)  # (*)
        scale_channels(site, (peaks**strength / weights ** (1 - strength)).clamp(min=1e-5))


# The outliers of large models, planted without changing the function


@torch.no_grad()
def plant_outliers(model: CausalLM, factor: float, channels: Sequence[int]) -> CausalLM:
    """Make some channels after both norms of every block `factor` times as large, and what reads them as much smaller.

    Models beyond about 6.7 billion parameters grow such channels by themselves (Dettmers et al. 2022, section 3); here
    they can be switched on. The model computes what it did. Raises ValueError for a channel that it does not have.
    """
    width = model.config.d_model
    if not all(0 <= channel < width for channel in channels):
        raise ValueError(f"channels {list(channels)} must be in 0..{width - 1}")
    scales = torch.ones(width)
    scales[list(channels)] = 1 / factor
    for site in scaling_sites(model):
        if not isinstance(site.maker, nn.Linear):  # a norm
            scale_channels(site, scales)
    return model
