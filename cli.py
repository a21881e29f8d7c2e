"""The command line: parse -> one interp call -> save -> print what and where. `python cli.py --help`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from interp import console
from interp.positions import POSITIONS

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Does a language model that was trained on feedback represent the reward it anticipates?",
)

Model = Annotated[
    str, typer.Option("--model", help="`smollm2` (embedded), a folder, a PEFT adapter's folder, or a Hub id.")
]
Data = Annotated[str, typer.Option("--data", help="A named set, a .jsonl/.jsonl.gz/.csv/.parquet file, or a Hub id.")]
Columns = Annotated[str | None, typer.Option("--columns", help="prompt=...,completion=...,score=... of that source.")]
Scale = Annotated[str | None, typer.Option("--scale", help="The ratings' scale, for example 1:10.")]
Rows = Annotated[
    int | None, typer.Option("--rows", min=1, help="Use about so many rows, whole prompts, drawn by --seed.")
]
Balance = Annotated[bool, typer.Option("--balance", help="Equal count per rounded rating, drawn by --seed.")]
Split = Annotated[str | None, typer.Option("--split", help="The split of a Hub set.")]
System = Annotated[str | None, typer.Option("--system", help="A system message put first.")]
Template = Annotated[
    str | None, typer.Option("--template", help="A chat template: a Jinja file, or a model that has one.")
]
MaxLength = Annotated[int, typer.Option("--max-length", min=8, help="Longer rows (tokens) are skipped and counted.")]
Device = Annotated[str | None, typer.Option("--device", help="cuda, mps or cpu; chosen if not given.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; chosen if not given.")]
BatchTokens = Annotated[int | None, typer.Option("--batch-tokens", min=1, help="Padded tokens of one forward call.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Revision of a Hub model.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the Hub model's own code.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Folds, nulls, samples.")]
Workspace = Annotated[
    Path | None, typer.Option("--workspace", help="Models, activations, results (or INTERP_WORKSPACE).")
]
Figures = Annotated[Path, typer.Option("--figures", help="Where pictures go.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No notes and no progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.callback()
def common() -> None:
    """Every command works with no option: on the embedded model and the shipped set."""


@app.command("data")
def data_command(
    source: Annotated[str, typer.Argument(help="A named set, a file, or a Hub id.")] = "pocketfeedback",
    columns: Columns = None,
    scale: Scale = None,
    rows: Rows = None,
    balance: Balance = False,
    split: Split = None,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show a rated set: rows, prompts, completions per prompt, ratings, lengths, duplicates, skipped rows."""
    from interp import data, views

    out = console.Console(as_json, quiet)
    console.calm()
    rated = _rated(source, columns, scale, rows, balance, split, seed)
    facts = out.envelope("data", rated.name, None, seed=seed, **data.summary(rated), assumptions=list(rated.notes))
    out.notes(rated.notes)
    views.show_data(out, facts)
    out.json(facts)


@app.command()
def probe(
    layer: Annotated[str, typer.Option("--layer", help="all, last, or numbers and ranges: 0,8,16-24.")] = "all",
    position: Annotated[
        str,
        typer.Option("--position", help=f"all, or of {', '.join(POSITIONS)}, or integers (5: sixth token, -1: last)."),
    ] = "all",
    site: Annotated[str, typer.Option("--site", help="resid, resid_mid, attn_out or mlp_out.")] = "resid",
    model: Model = "smollm2",
    data: Data = "pocketfeedback",
    columns: Columns = None,
    scale: Scale = None,
    rows: Rows = None,
    balance: Balance = False,
    split: Split = None,
    controls: Annotated[
        bool, typer.Option("--controls", help="Also the same architecture with random weights.")
    ] = False,
    nested_null: Annotated[
        bool, typer.Option("--nested-null", help="Repeat the whole nested selection on 200 permuted labels.")
    ] = False,
    system: System = None,
    template: Template = None,
    max_length: MaxLength = 1024,
    device: Device = None,
    dtype: Dtype = None,
    batch_tokens: BatchTokens = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    seed: Seed = 0,
    workspace: Workspace = None,
    figures: Figures = Path("figures"),
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """At which layers and positions can the rating of a completion be read, how well, and beyond what baselines?"""
    out = console.Console(as_json, quiet)
    console.calm()
    from interp import positions, runs, views
    from interp.activations import parse_layers
    from interp.analyses import grid

    names = positions.parse(position)
    rated = _rated(data, columns, scale, rows, balance, split, seed)
    subject, encoder = _subject(model, device, dtype, revision, trust_remote_code, workspace, template, system)
    settings = grid.Settings(
        layers=parse_layers(layer, subject, site),
        positions=names,
        site=site,
        max_length=max_length,
        seed=seed,
        nested_draws=200 if nested_null else 0,
        controls=controls,
    )
    out.notes([*subject.notes, *encoder.notes, *rated.notes, *grid.few_prompts(rated)])
    folder = runs.folder("probe", subject.name, rated.name, settings.key(subject, rated, encoder), workspace)
    saved = result = runs.load_grid(folder)
    if result is None:
        with out.progress() as stage:
            options = {"workspace_dir": workspace, "batch_tokens": batch_tokens, "progress": stage}
            result = grid.compute(subject, rated, encoder, settings, **options)
    else:
        out.notes([f"read from {folder} (same model, data and settings)"])
    drawn = runs.draw(result, figures / folder.name, "python cli.py " + " ".join(sys.argv[1:]))
    facts = {**result.facts, "run_dir": str(folder), "figures": [str(path) for path in drawn]}
    if saved is None:
        runs.save_grid(replace(result, facts=facts), folder)
    views.show_probe(out, facts)
    out.json(facts)


@app.command()
def score(
    source: Annotated[str | None, typer.Argument(help="A file of conversations, or a Hub id.")] = None,
    text: Annotated[list[str] | None, typer.Option("--text", help="A completion to score; repeatable.")] = None,
    prompt: Annotated[str, typer.Option("--prompt", help="The prompt that --text answers.")] = "",
    probe_path: Annotated[
        str | None,
        typer.Option("--probe", help="A run's folder or a probe file; else the newest one that fits the model."),
    ] = None,
    model: Model = "smollm2",
    columns: Columns = None,
    system: System = None,
    template: Template = None,
    max_length: MaxLength = 1024,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    workspace: Workspace = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Score texts with a fitted probe: the rating that it reads, in points."""
    out = console.Console(as_json, quiet)
    console.calm()
    from interp import data, runs, views
    from interp.analyses import scoring

    if bool(text) == bool(source):
        raise typer.BadParameter("give either --text (and --prompt) or a file of conversations")
    rows = data.load_texts(source, columns=data.parse_columns(columns) if columns else None) if source else [
        {"prompt": prompt, "completion": completion} for completion in text or ()
    ]  # fmt: skip
    subject, encoder = _subject(model, device, dtype, revision, trust_remote_code, workspace, template, system)
    found, where = runs.find_probe(subject, probe_path, workspace)
    encoder = scoring.as_fitted(encoder, found)
    result = scoring.compute(subject, encoder, found, rows, max_length=max_length)
    notes = [*subject.notes, *encoder.notes, f"probe {where}", *runs.mismatch(found, subject), *result.notes]
    if text and not prompt:
        notes.append("no --prompt: the text is scored as the reply to an empty message")
    out.notes(notes)
    facts = out.envelope("score", source, subject.name, probe=where, **result.facts, assumptions=notes)
    views.show_scores(out, facts)
    out.json(facts)


def _rated(
    source: str, columns: str | None, scale: str | None, rows: int | None, balance: bool, split: str | None, seed: int
) -> Any:
    from interp import data

    return data.load(
        source,
        columns=data.parse_columns(columns) if columns else None,
        scale=data.parse_scale(scale) if scale else None,
        rows=rows,
        seed=seed,
        balance=balance,
        split=split,
    )


def _subject(
    model: str,
    device: str | None,
    dtype: str | None,
    revision: str | None,
    trust_remote_code: bool,
    workspace: Path | None,
    template: str | None,
    system: str | None,
) -> tuple[Any, Any]:
    """(the loaded model, its encoder)."""
    from interp import chat, models

    options = {"revision": revision, "trust_remote_code": trust_remote_code, "workspace_dir": workspace}
    console.calm_transformers()
    subject = models.load(model, device=device, dtype=dtype, **options)
    return subject, chat.Encoder(subject.tokenizer, chat.read_template(template), system)


def main() -> None:
    """The console's entry point."""
    sys.exit(console.run(app))


if __name__ == "__main__":
    main()
