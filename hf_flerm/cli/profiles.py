"""What `hf-flerm` does with profiles; see `cli.py` for the command itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import hf_flerm

if TYPE_CHECKING:
    import torch

DIFFERENT = 1
HERE, PICTURE, PAGE = Path(), Path("rate_profile.png"), Path("rate_profile.html")

Source = Annotated[
    str, typer.Argument(help="A folder, a file, or a repository: org/repo, org/repo@revision/subfolder.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")]
Picture = Literal["rates", "layers", "multipliers"]
Granularity = Literal["tensor", "module", "block", "global"]
Depth = Literal["joint", "equal", "sqrt", "copy"]
Unmatched = Literal["error", "global", "nominal", "freeze"]

commands = typer.Typer()


@commands.command()
def inspect(profile: Source, as_json: AsJson = False) -> None:
    """Say where a profile comes from, and its rates by kind of tensor (geometric means, output units per unit lr)."""
    from ..show.summary import described, rates_by_kind

    with explained():
        found = hf_flerm.RateProfile.from_pretrained(profile)
    kinds = {
        kind: {"tensors": len(rates.names), "rates": [_finite(rate) for rate in rates.mean.tolist()]}
        for kind, rates in rates_by_kind(found).items()
    }
    content = {
        "about": described(found),
        "commit": found.commit_hash,
        "steps": found.steps.tolist(),
        "kinds": kinds,
        "scales": found.about.matched_scales,
    }
    about = described(found) | ({"commit": found.commit_hash} if found.commit_hash else {})
    lines = [f"{what:14} {_text(text)}" for what, text in about.items()]
    lines += ["", f"{'first rate':>11} {'last rate':>11}  tensors  kind"]
    for kind, rates in rates_by_kind(found).items():
        ends = rates.mean[[0, -1]].tolist() if len(rates.mean) else [0.0, 0.0]
        first, last = (f"{_finite(rate) or 0:.3g}" for rate in ends)
        lines.append(f"{first:>11} {last:>11}  {len(rates.names):7}  {_text(kind)}")
    show(content, lines, as_json)


@commands.command()
def validate(profile: Source, as_json: AsJson = False) -> None:
    """Check that a file is a whole and valid profile. Exit code 2 if not."""
    with explained():
        found = hf_flerm.RateProfile.from_pretrained(profile)
    content = {"valid": True, "tensors": len(found.names), "steps": len(found.steps), "commit": found.commit_hash}
    show(content, [f"valid: {len(found.names)} tensors, {len(found.steps)} steps"], as_json)


@commands.command()
def diff(
    first: Source,
    second: Source,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest relative difference of (joint) rates that is none.")
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Compare the rates of two profiles. Exit code 0: alike; 1: different; 2: one cannot be read."""
    import torch

    from ..show.summary import rates_by_kind

    with explained():
        one, other = hf_flerm.RateProfile.from_pretrained(first), hf_flerm.RateProfile.from_pretrained(second)
    content: dict[str, Any] = {
        "steps": [one.steps.tolist(), other.steps.tolist()],
        "only_in_first": sorted(one.rates.keys() - other.rates.keys()),
        "only_in_second": sorted(other.rates.keys() - one.rates.keys()),
        "metadata": sorted(
            key
            for key in one.metadata.keys() | other.metadata.keys()
            if one.metadata.get(key) != other.metadata.get(key)
        ),
        "kinds": {},
        "largest": None,
    }
    same_steps = torch.equal(one.steps, other.steps)
    common = [name for name in one.names if name in other.rates]
    if same_steps and common and len(one.steps):
        pairs = [(groups, other.joint_rates.get(kind, {})) for kind, groups in one.joint_rates.items()]
        largest = max(
            _relative(rates[name], others[name])
            for rates, others in [(one.rates, other.rates), *pairs]
            for name in rates.keys() & others.keys()
        )
        content["largest"] = _finite(largest)
        others = rates_by_kind(other)
        content["kinds"] = {
            kind: [_finite(ratio) for ratio in (others[kind].mean / rates.mean).tolist()]
            for kind, rates in rates_by_kind(one).items()
            if kind in others
        }
        differs = largest > tolerance
    else:
        differs = not same_steps or not common
    differs = differs or bool(content["only_in_first"] or content["only_in_second"])
    content["differs"] = differs
    only = {key: content[key] for key in ("only_in_first", "only_in_second") if content[key]}
    lines = [f"{key.replace('_', ' ')}: {_text(names)}" for key, names in only.items()]
    lines += [] if same_steps else [f"steps: {content['steps'][0]} and {content['steps'][1]}"]
    lines += [f"metadata that differ: {_text(', '.join(content['metadata']))}"] if content["metadata"] else []
    lines += [
        f"second / first, at the first and last step: {_ratio(ratios[0])}, {_ratio(ratios[-1])}  {_text(kind)}"
        for kind, ratios in (content["kinds"].items() if differs else ())
    ]
    lines.append("different" if differs else "alike")
    show(content, lines, as_json)
    raise typer.Exit(DIFFERENT if differs else 0)


@commands.command()
def average(
    profiles: Annotated[list[str], typer.Argument(help="Two or more: folders, files or repositories.")],
    output: Output,
    as_json: AsJson = False,
) -> None:
    """Average profiles of the same model and steps geometrically, for instance over seeds."""
    with explained():
        if len(profiles) < 2:
            raise hf_flerm.RateProfileError("there is one profile: give two or more.")
        file = hf_flerm.RateProfile.average(profiles).save_pretrained(output)
    show({"file": str(file), "averaged_over": len(profiles)}, [str(file)], as_json)


@commands.command("map")
def map_(
    profile: Source,
    model: Annotated[str, typer.Argument(help="The target: what has a config.json; weights are not read.")],
    adapter: Annotated[str | None, typer.Option(help="What has the target's adapter_config.json.")] = None,
    granularity: Annotated[Granularity, typer.Option(help="What is matched.")] = "tensor",
    depth: Annotated[Depth, typer.Option(help="How a block's rate is split.")] = "equal",
    unmatched: Annotated[Unmatched, typer.Option(help="What becomes of tensors without a rate.")] = "error",
    as_json: AsJson = False,
) -> None:
    """Say which rates of a profile stand for which tensors of a model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with explained():
        base = hf_flerm.RateProfile.from_pretrained(profile)
        with torch.device("meta"):
            target: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
            target.tie_weights()  # which transformers 5.0 leaves undone without memory
            if adapter is not None:
                target = adapted(target, adapter)
        found = hf_flerm.map_profile(base, target, granularity=granularity, depth=depth, unmatched=unmatched)
    content = {
        "units": {
            name: {"sources": list(unit.sources), "shares": dict(unit.shares), "rates": unit.rates.tolist()}
            for name, unit in found.units.items()
        },
        "unmatched": list(found.unmatched),
        "unused": list(found.unused),
    }
    show(content, [_text(line) for line in str(found).splitlines()], as_json)


@commands.command()
def plot(
    profile: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture: .png, .svg or .pdf.")] = PICTURE,
    what: Annotated[Picture, typer.Option(help="By kind, by layer, or a matched run's multipliers.")] = "rates",
    as_json: AsJson = False,
) -> None:
    """Draw a profile into a file."""
    from ..show.plotting import PICTURES

    with explained():
        figure = PICTURES[what](hf_flerm.RateProfile.from_pretrained(profile))
        figure.savefig(output, dpi=150)
    show({"file": str(output)}, [str(output)], as_json)


@commands.command("report")
def report_(
    profile: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page: .html.")] = PAGE,
    as_json: AsJson = False,
) -> None:
    """Show a profile in one HTML file that opens offline and can be zoomed."""
    from ..show.report import report

    with explained():
        output.write_text(report(hf_flerm.RateProfile.from_pretrained(profile)), encoding="utf-8")
    show({"file": str(output)}, [str(output)], as_json)


@commands.command()
def push(
    profile: Source,
    repo: Annotated[str, typer.Argument(help="The repository, made if it is not there.")],
    subfolder: Annotated[str | None, typer.Option(help="Folder inside of it.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    private: Annotated[bool | None, typer.Option(help="Whether a new repository is private.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload rate profile",
    as_json: AsJson = False,
) -> None:
    """Upload a profile with its card and picture; the token is that of `hf auth login` or HF_TOKEN."""
    with explained():
        commit = hf_flerm.RateProfile.from_pretrained(profile).push_to_hub(
            repo,
            subfolder=subfolder,
            revision=revision,
            private=private,
            create_pr=create_pr,
            commit_message=message,
        )
    address = commit.pr_url or commit.commit_url
    show({"url": address, "commit": commit.oid}, [str(address)], as_json)


@commands.command()
def pull(
    profile: Source,
    output: Output = HERE,
    as_json: AsJson = False,
) -> None:
    """Download a profile into a folder."""
    with explained():
        found = hf_flerm.RateProfile.from_pretrained(profile)
        file = found.save_pretrained(output)
    show({"file": str(file), "commit": found.commit_hash}, [str(file)], as_json)


def adapted(model: Any, source: str) -> Any:
    """Put an adapter into a model, to be trained.

    Args:
        model: The model.
        source: What has the adapter's config; PEFT saves that of a trained one as for inference.

    Returns:
        The model with the adapter.
    """
    from peft import PeftConfig, get_peft_model

    config = PeftConfig.from_pretrained(source)
    config.inference_mode = False
    return get_peft_model(model, config)


@contextmanager
def explained() -> Iterator[None]:
    """Turn what is wrong with the input into a message and exit code 2."""
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        raise typer.BadParameter(_text(error)) from error


def show(content: dict[str, Any], lines: list[str], as_json: bool) -> None:
    """Print what a command found, as JSON or as lines."""
    typer.echo(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) if as_json else "\n".join(lines))


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    size = one.maximum(other)
    return float(((one - other).abs() / size.where(size > 0, 1.0)).max())


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _text(value: object) -> str:
    """A text from a file as a terminal may have it."""
    return "".join(character if character.isprintable() else " " for character in str(value))
