"""The commands of `hf-flerm` that work on profiles.

Modules are imported inside the commands, to keep `--help` and shell completion fast. Only `map` and `push` load torch.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import hf_flerm

from ..choices import Depth, Granularity, Picture, Unmatched
from .checks import check_folder, check_output_folder, check_suffix, errors_as_usage, printable, quiet_libraries

if TYPE_CHECKING:
    from torch import nn

    from hf_flerm import RateProfile

    from ..profile.table import Row

DIFFERENT = 1  # exit code of `diff`; click uses 2 for wrong input
_PICTURE_FILES, _PAGES = (".png", ".svg", ".pdf"), (".html", ".htm")
HERE, PICTURE, PAGE = Path(), Path("rate_profile.png"), Path("rate_profile.html")

Source = Annotated[
    str, typer.Argument(help="A folder, a file, or a repository: org/repo, org/repo@revision/subfolder.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to; created if it does not exist.")]

commands = typer.Typer()


@commands.command()
def inspect(profile: Source, as_json: AsJson = False) -> None:
    """Show the origin of a profile and its rates by kind of tensor.

    Rates are geometric means over the tensors of a kind, in output units per unit learning rate.
    """
    from ..show.summary import describe, rates_by_kind

    with errors_as_usage():
        found = hf_flerm.RateProfile.from_pretrained(profile)
    kinds = {
        kind: {"tensors": len(rates.names), "rates": [_finite(rate) for rate in rates.mean.tolist()]}
        for kind, rates in rates_by_kind(found).items()
    }
    content = {
        "about": describe(found),
        "commit": found.commit_hash,
        "steps": found.table.steps.tolist(),
        "kinds": kinds,
        "scales": {unit: _finite(scale) for unit, scale in found.about.matched_scales.items()},
    }
    about = describe(found) | ({"commit": found.commit_hash} if found.commit_hash else {})
    lines = [f"{what:14} {printable(text)}" for what, text in about.items()]
    lines += ["", f"{'first rate':>11} {'last rate':>11}  tensors  kind"]
    for kind, rates in rates_by_kind(found).items():
        ends = rates.mean[[0, -1]].tolist() if len(rates.mean) else [0.0, 0.0]
        first, last = (f"{_finite(rate) or 0:.3g}" for rate in ends)
        lines.append(f"{first:>11} {last:>11}  {len(rates.names):7}  {printable(kind)}")
    print_result(content, lines, as_json)


@commands.command()
def validate(profile: Source, as_json: AsJson = False) -> None:
    """Check that a file is a complete, valid profile; exit code 2 if it is not."""
    with errors_as_usage():
        found = hf_flerm.RateProfile.from_pretrained(profile)
    content = {"valid": True, "tensors": len(found.names), "steps": len(found.table.steps), "commit": found.commit_hash}
    print_result(content, [f"valid: {len(found.names)} tensors, {len(found.table.steps)} steps"], as_json)


@commands.command()
def diff(
    first: Source,
    second: Source,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest relative difference of rates and joint rates that counts as equal.")
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Compare the rates of two profiles.

    Exit code 0: equal; 1: different; 2: a profile cannot be read.
    """
    with errors_as_usage():
        one, other = hf_flerm.RateProfile.from_pretrained(first), hf_flerm.RateProfile.from_pretrained(second)
    content = _compared(one, other, tolerance)
    print_result(content, _difference(content), as_json)
    raise typer.Exit(DIFFERENT if content["differs"] else 0)


def _compared(one: RateProfile, other: RateProfile, tolerance: float) -> dict[str, Any]:
    from ..show.summary import rates_by_kind

    first, second = one.table, other.table
    steps = [first.steps.tolist(), second.steps.tolist()]
    only_in_first, only_in_second = first.rates.keys() - second.rates.keys(), second.rates.keys() - first.rates.keys()
    largest, ratios = None, {}
    if steps[0] == steps[1] != [] and first.rates.keys() & second.rates.keys():
        pairs = [(first.rates, second.rates)]
        pairs += [(groups, second.joint_rates.get(path, {})) for path, groups in first.joint_rates.items()]
        largest = max(
            _relative(rates[name], others[name]) for rates, others in pairs for name in rates.keys() & others.keys()
        )
        kinds, others_by_kind = rates_by_kind(one), rates_by_kind(other)
        ratios = {
            kind: [_finite(ratio) for ratio in (others_by_kind[kind].mean / rates.mean).tolist()]
            for kind, rates in kinds.items()
            if kind in others_by_kind
        }
    keys = one.metadata.keys() | other.metadata.keys()
    return {
        "steps": steps,
        "only_in_first": sorted(only_in_first),
        "only_in_second": sorted(only_in_second),
        "metadata": sorted(key for key in keys if one.metadata.get(key) != other.metadata.get(key)),
        "kinds": ratios,
        "largest": None if largest is None else _finite(largest),
        "differs": bool(only_in_first or only_in_second) or steps[0] != steps[1] or (largest or 0.0) > tolerance,
    }


def _difference(content: dict[str, Any]) -> list[str]:
    lines = [
        f"{key.replace('_', ' ')}: {printable(content[key])}"
        for key in ("only_in_first", "only_in_second")
        if content[key]
    ]
    first, second = content["steps"]
    lines += [] if first == second else [f"steps: {first} and {second}"]
    lines += [f"metadata that differ: {printable(', '.join(content['metadata']))}"] if content["metadata"] else []
    lines += [
        f"second / first, at the first and last step: {_ratio(ratios[0])}, {_ratio(ratios[-1])}  {printable(kind)}"
        for kind, ratios in (content["kinds"].items() if content["differs"] else ())
    ]
    return [*lines, "different" if content["differs"] else "equal"]


@commands.command()
def average(
    profiles: Annotated[list[str], typer.Argument(help="Two or more profiles: folders, files or repositories.")],
    output: Output,
    as_json: AsJson = False,
) -> None:
    """Write the geometric mean of profiles of the same model and steps, for instance over seeds."""
    with errors_as_usage():
        if len(profiles) < 2:
            raise hf_flerm.RateProfileError("an average needs two or more profiles; got one.")
        check_output_folder(output)
        file = hf_flerm.RateProfile.average(profiles).save_pretrained(output)
    print_result({"file": str(file), "averaged_over": len(profiles)}, [str(file)], as_json)


@commands.command("map")
def map_(
    model: Annotated[
        str, typer.Argument(help="The target: a folder or repository with a config.json. Weights are not read.")
    ],
    profile: Source,
    adapter: Annotated[
        str | None, typer.Option(help="Folder or repository with the target's adapter_config.json.")
    ] = None,
    granularity: Annotated[Granularity, typer.Option(help="What gets its own scale.")] = "tensor",
    depth: Annotated[
        Depth, typer.Option(help="How the rate of a base block is split over the corresponding target blocks.")
    ] = "equal",
    unmatched: Annotated[
        Unmatched, typer.Option(help="What happens to tensors without a rate in the profile.")
    ] = "error",
    as_json: AsJson = False,
) -> None:
    """Show which rates of a profile apply to which tensors of a model."""
    with errors_as_usage():
        model, profile = _model_first(model, profile)
        check_folder("model", model)
        if adapter is not None:
            check_folder("adapter", adapter)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with errors_as_usage(), quiet_libraries():
        base = hf_flerm.RateProfile.from_pretrained(profile)
        with torch.device("meta"):
            target: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
            target.tie_weights()  # transformers 5.0 does not tie weights on the meta device
            if adapter is not None:
                target = with_adapter(target, adapter)
        found = hf_flerm.map_profile(base, target, granularity=granularity, depth=depth, unmatched=unmatched)
    content = {
        "units": {
            name: {"sources": list(unit.sources), "shares": dict(unit.shares), "rates": unit.rates.tolist()}
            for name, unit in found.units.items()
        },
        "unmatched": list(found.unmatched),
        "unused": list(found.unused),
    }
    print_result(content, [printable(line) for line in str(found).splitlines()], as_json)


@commands.command()
def plot(
    profile: Source,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write: .png, .svg or .pdf. Its folder is created.")
    ] = PICTURE,
    what: Annotated[
        Picture,
        typer.Option(
            help="Rates by kind of tensor, by layer, the multipliers of a matched run, or the losses of a sweep."
        ),
    ] = "rates",
    as_json: AsJson = False,
) -> None:
    """Draw a figure of a profile."""
    with errors_as_usage():
        check_suffix(output, _PICTURE_FILES)
        from ..show.plotting import PICTURES

        figure = PICTURES[what](hf_flerm.RateProfile.from_pretrained(profile))
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=150)
    print_result({"file": str(output)}, [str(output)], as_json)


@commands.command("report")
def report_(
    profile: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .html. Its folder is created.")] = PAGE,
    as_json: AsJson = False,
) -> None:
    """Write an HTML page with zoomable figures of a profile; it works offline."""
    with errors_as_usage():
        check_suffix(output, _PAGES)
        from ..show.report import report

        page = report(hf_flerm.RateProfile.from_pretrained(profile))
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page, encoding="utf-8")
    print_result({"file": str(output)}, [str(output)], as_json)


@commands.command()
def push(
    profile: Source,
    repo: Annotated[str, typer.Argument(help="Id of the repository; created if it does not exist.")],
    subfolder: Annotated[str | None, typer.Option(help="Folder inside the repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; created if it does not exist.")] = None,
    private: Annotated[
        bool | None, typer.Option(help="Whether a new repository is private. Default: the setting of its owner.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload rate profile",
    as_json: AsJson = False,
) -> None:
    """Upload a profile with its card and picture to the Hub.

    Uses the token of `hf auth login` or of HF_TOKEN.
    """
    with errors_as_usage():
        commit = hf_flerm.RateProfile.from_pretrained(profile).push_to_hub(
            repo,
            subfolder=subfolder,
            revision=revision,
            private=private,
            create_pr=create_pr,
            commit_message=message,
        )
    address = commit.pr_url or commit.commit_url
    print_result({"url": address, "commit": commit.oid}, [str(address)], as_json)


@commands.command()
def pull(
    profile: Source,
    output: Output = HERE,
    as_json: AsJson = False,
) -> None:
    """Download a profile from the Hub into a folder."""
    with errors_as_usage():
        check_output_folder(output)
        found = hf_flerm.RateProfile.from_pretrained(profile)
        file = found.save_pretrained(output)
    print_result({"file": str(file), "commit": found.commit_hash}, [str(file)], as_json)


def _model_first(first: str, second: str) -> tuple[str, str]:
    """Return the model and the profile; in the other order, as in version 0.1, if the folders leave no doubt."""
    from ..profile.file import PROFILE_NAME

    one, other = Path(first), Path(second)
    is_profile = [path.suffix == ".safetensors" or (path / PROFILE_NAME).is_file() for path in (one, other)]
    is_model = [(path / "config.json").is_file() for path in (one, other)]
    if is_profile != [True, False] or is_model != [False, True]:
        return first, second
    typer.echo(f"warning: the model comes first: hf-flerm map {printable(second)} {printable(first)}", err=True)
    return second, first


def with_adapter(model: Any, source: str) -> nn.Module:
    """Add a trainable adapter, with the config in folder or repository `source`, to a model."""
    from peft import PeftConfig, get_peft_model

    config = PeftConfig.from_pretrained(source)
    config.inference_mode = False  # PEFT saves the config of a trained adapter for inference
    adapted_model: nn.Module = get_peft_model(model, config)
    return adapted_model


def print_result(content: dict[str, Any], lines: list[str], as_json: bool) -> None:
    """Print the result of a command, as JSON or as lines."""
    typer.echo(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) if as_json else "\n".join(lines))


def _relative(one: Row, other: Row) -> float:
    import numpy as np

    size = np.maximum(one, other)
    return float((abs(one - other) / np.where(size > 0, size, 1.0)).max())


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
