"""`emo-select pretrain` and `emo-select doctor`: recipes carried out by ai2-olmo-core."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emo_select.cli.common import MACHINE, OUTPUT, AsJson, DryRun, emit, writable
from emo_select.progress import say, talk

if TYPE_CHECKING:
    from emo_select.pretrain.plan import Plan
    from emo_select.pretrain.recipe import Recipe
    from emo_select.pretrain.run import RunRecord, RunSettings
    from emo_select.sweeps.profile import Profile

TRAIN, WATCH, MODULAR = "Training", "Watching", "Modularity"

Name = Annotated[str | None, typer.Argument(metavar="RECIPE", help="A recipe's name (see --list) or a YAML file.",
                                            show_default=False)]
Data = Annotated[Path | None, typer.Option("--data", "-d", help="Folder of `emo-select tokenize`, a mix (label,path "
                                           "lines) or a token file.", rich_help_panel=TRAIN)]
DataRoot = Annotated[Path | None, typer.Option("--data-root", help="Where a mix's relative paths begin.",
                                               rich_help_panel=TRAIN)]
TokenizerName = Annotated[str | None, typer.Option("--tokenizer", help="Of token files without a manifest: "
                                                   "folder or Hub id.", rich_help_panel=TRAIN)]
Out = Annotated[Path | None, typer.Option("--out", "-o", callback=writable, show_default="pretrained/<recipe>",
                                          help="Folder of the run.", rich_help_panel=OUTPUT)]
Set = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe, such as "
                                        "optimizer.learning_rate=0.001.", rich_help_panel=TRAIN)]
From = Annotated[Path | None, typer.Option("--from", help="Training checkpoint to anneal from.",
                                           rich_help_panel=TRAIN)]
NewData = Annotated[bool, typer.Option("--new-data", help="With --from: begin the data anew, and the steps with it.",
                                       rich_help_panel=TRAIN)]
PublishedDraws = Annotated[bool, typer.Option("--published-draws", help="Draw pool sizes from the global generator, "
                                              "as published; resuming is then not exact.", rich_help_panel=TRAIN)]
StopAt = Annotated[int | None, typer.Option("--stop-at", min=1, help="End after this step; the schedule stays.",
                                            rich_help_panel=TRAIN)]
Gpus = Annotated[int | None, typer.Option("--gpus", min=1, show_default="1, or the profile's", help="Processes, one "
                                          "per GPU.", rich_help_panel=MACHINE)]
OtherRanks = Annotated[bool, typer.Option("--allow-other-ranks", help="Go on with another number of processes.",
                                          rich_help_panel=MACHINE)]
ProfileName = Annotated[str | None, typer.Option("--profile", help="Hand the run to Slurm by this profile "
                                                 "(docs/sweeps.md).", rich_help_panel=MACHINE)]
Profiles = Annotated[Path | None, typer.Option("--profiles", help="File of profiles.", show_default="the user's own",
                                               rich_help_panel=MACHINE)]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.", rich_help_panel=MACHINE)]
Compile = Annotated[bool, typer.Option("--compile/--no-compile", help="Compile blocks on a GPU.",
                                       rich_help_panel=MACHINE)]
Threads = Annotated[int, typer.Option("--threads", min=1, help="CPU threads of each process.",
                                      rich_help_panel=MACHINE)]
Spike = Annotated[float, typer.Option("--spike", min=0, help="Stop where the loss rises by so many nats above its "
                                      "recent mean; 0: never.", rich_help_panel=WATCH)]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Log to TensorBoard.", rich_help_panel=WATCH)]
Wandb = Annotated[str | None, typer.Option("--wandb", metavar="PROJECT", help="Log to W&B.", rich_help_panel=WATCH)]
Evals = Annotated[bool, typer.Option("--benchmarks/--no-benchmarks", help="The recipe's benchmarks during training.",
                                     rich_help_panel=WATCH)]
Rate = Annotated[float | None, typer.Option("--tokens-per-second", min=1, help="With --dry-run: rate of one GPU, for "
                                            "GPU-hours.", rich_help_panel=OUTPUT)]
Listing = Annotated[bool, typer.Option("--list", help="Show the shipped recipes.", rich_help_panel=OUTPUT)]
Modularity = Annotated[list[str], typer.Option("--evaluate-modularity", metavar="KEEP-K", help="After training, "
                                               "select, prune and evaluate saved steps with so many experts.",
                                               rich_help_panel=MODULAR)]
ModularTask = Annotated[list[str], typer.Option("--modularity-task", help="Tasks for that.", rich_help_panel=MODULAR)]
ModularSteps = Annotated[int, typer.Option("--modularity-steps", min=1, help="Saved steps to look at, evenly spread, "
                                           "the last included.", rich_help_panel=MODULAR)]

ModularLimit = Annotated[int | None, typer.Option("--modularity-limit", min=1, show_default="all",
                                                  help="Test documents of each task.", rich_help_panel=MODULAR)]


def pretrain(
    recipe: Name = None,
    data: Data = None,
    data_root: DataRoot = None,
    tokenizer: TokenizerName = None,
    out: Out = None,
    changes: Set = [],  # noqa: B006
    start: From = None,
    new_data: NewData = False,
    published_draws: PublishedDraws = False,
    stop_at: StopAt = None,
    gpus: Gpus = None,
    allow_other_ranks: OtherRanks = False,
    profile: ProfileName = None,
    profiles: Profiles = None,
    device: Device = "auto",
    compile_blocks: Compile = True,
    threads: Threads = 1,
    spike: Spike = 2.0,
    tensorboard: TensorBoard = False,
    wandb: Wandb = None,
    benchmarks: Evals = True,
    evaluate_modularity: Modularity = [],  # noqa: B006
    modularity_task: ModularTask = [],  # noqa: B006
    modularity_steps: ModularSteps = 3,
    modularity_limit: ModularLimit = None,
    tokens_per_second: Rate = None,
    listing: Listing = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Pretrain an EMO, standard or dense model by a recipe; the same command goes on where it was stopped.

    Needs the extra `pretrain`. Under torchrun and Slurm every process runs the same command.
    """
    from emo_select.errors import SpecError
    from emo_select.pretrain.run import RunSettings

    if listing:
        _list(as_json)
        return
    if recipe is None:
        raise SpecError("Name a recipe; `emo-select pretrain --list` shows the shipped ones.")
    chosen = _recipe(recipe, changes, published_draws)
    site = _site(profile, profiles) if profile is not None else None
    processes = _processes(gpus, site)
    settings = RunSettings(
        data=str(data or ""), data_root=str(data_root) if data_root else None, tokenizer=tokenizer, device=device,
        compile=compile_blocks, threads=threads, stop_at=stop_at, spike=spike, tensorboard=tensorboard, wandb=wandb,
        evaluate=benchmarks)
    if dry_run:
        _show_plan(chosen, settings, processes, tokens_per_second, as_json)
        return
    if data is None:
        raise SpecError("--data names the token files; `emo-select tokenize` makes them from text.")
    folder = out or Path("pretrained") / chosen.name
    record = _record(chosen, settings, processes, start, new_data)
    _start(folder, record, settings, site, allow_other_ranks)
    if site is None and evaluate_modularity:
        _modularity(folder, evaluate_modularity, modularity_task, modularity_steps, modularity_limit)
    if as_json:
        emit({"run": str(folder), "steps": chosen.steps})


def _recipe(name: str, changes: list[str], published_draws: bool) -> Recipe:
    import yaml

    from emo_select.errors import SpecError
    from emo_select.pretrain.recipe import load_recipe

    wanted: dict[str, Any] = {"objective.published_draws": True} if published_draws else {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise SpecError(f"--set {change} is not KEY=VALUE.")
        wanted[key] = yaml.safe_load(value)
    return load_recipe(name, wanted)


def _site(name: str, file: Path | None) -> Profile:
    """The Slurm profile of a run."""
    from emo_select.sweeps.profile import load_profile

    return load_profile(name, file, {})


def _processes(gpus: int | None, site: Profile | None) -> int:
    """Processes of the run: those that torchrun started, else the option, else the profile's GPUs."""
    import os

    if (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        return world
    return gpus or (max(1, site.gpus) if site is not None else 1)


def _show_plan(recipe: Recipe, settings: RunSettings, gpus: int, rate: float | None, as_json: bool) -> None:
    from emo_select.pretrain.plan import Plan, check_divides
    from emo_select.pretrain.run import check_data, open_data, with_tokenizer_of

    available = None
    if settings.data:
        data = open_data(settings)
        recipe, available = with_tokenizer_of(recipe, data), data.tokens
        check_data(recipe, data)
    check_divides(recipe, gpus)
    plan = Plan(recipe, gpus, rate, available)
    if as_json:
        emit(plan.told())
    else:
        talk(_plan_table(plan))


def _plan_table(plan: Plan) -> Any:
    from rich.table import Table

    total, active = plan.told()["parameters"], plan.told()["active_parameters"]
    table = Table(title=f"{plan.recipe.name} on {plan.gpus} GPU{'s' if plan.gpus > 1 else ''}", show_header=False)
    rows: dict[str, str] = {
        "parameters": f"{total:,} ({active:,} per token)",
        "steps": f"{plan.recipe.steps:,} of {plan.recipe.batch_tokens:,} tokens",
        "tokens": f"{plan.tokens:,}" + ("" if plan.epochs is None else f", the data {plan.epochs:.2f} times"),
        "micro-batches": f"{plan.accumulated} a step on each GPU; experts balanced over {plan.balance_group} sequences",
        "token files": f"{plan.data_bytes / 1e9:,.1f} GB",
        "checkpoints": f"{plan.checkpoints} of {plan.checkpoint_bytes / 1e9:,.1f} GB",
        "memory per GPU": f"about {plan.gpu_bytes / 1e9:,.1f} GB",
        "operations": f"{plan.flops:.2e}",
    }
    if plan.gpu_hours is not None:
        rows["GPU-hours"] = f"{plan.gpu_hours:,.0f} ({plan.gpu_hours / plan.gpus / 24:,.1f} days)"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _list(as_json: bool) -> None:
    from emo_select.pretrain.recipe import load_recipe, recipe_names

    recipes = [load_recipe(name) for name in recipe_names()]
    if as_json:
        emit([recipe.model_dump() for recipe in recipes])
        return
    for recipe in recipes:
        typer.echo(f"{recipe.name:<34}{recipe.released_as or ''}".rstrip())
        typer.echo(f"    {recipe.about}")


def _record(recipe: Recipe, settings: RunSettings, processes: int, start: Path | None, new_data: bool) -> RunRecord:
    """Everything that can be wrong with the request is found here, before work."""
    from emo_select.errors import SpecError
    from emo_select.pretrain.plan import check_divides
    from emo_select.pretrain.run import RunRecord, check_data, give_wandb_its_key, open_data, with_tokenizer_of

    check_divides(recipe, processes)
    data = open_data(settings)
    recipe = with_tokenizer_of(recipe, data)
    check_data(recipe, data)
    if start is None and recipe.anneals:
        raise SpecError(f"{recipe.name} anneals a checkpoint of {recipe.anneals}; name it with --from.")
    _require_installed("olmo_core", "Pretraining needs ai2-olmo-core: pip install 'emo-select[pretrain]'.")
    if settings.tensorboard:
        _require_installed("tensorboard", "--tensorboard needs TensorBoard: pip install tensorboard.")
    if settings.wandb:
        _require_installed("wandb", "--wandb needs W&B: pip install wandb.")
        give_wandb_its_key()
    started = None
    if start is not None:
        from emo_select.pretrain.engine.starting import describe

        started = describe(start, recipe, same_data=not new_data)
        if not started.optimiser:
            say("The checkpoint has no optimiser state: moments start at zero. A warm-up helps: "
                "--set schedule.warmup_steps=100.")
    return RunRecord(recipe=recipe, data_fingerprint=data.fingerprint, processes=processes, started=started)


def _require_installed(module: str, otherwise: str) -> None:
    from importlib.util import find_spec

    from emo_select.errors import SpecError

    if find_spec(module) is None:
        raise SpecError(otherwise)


def _start(out: Path, record: RunRecord, settings: RunSettings, site: Profile | None, other_ranks: bool) -> None:
    """Here, in several processes of this machine, or on Slurm."""
    import os

    from emo_select.pretrain import run

    record = run.require_same(out, record, other_ranks=other_ranks)
    first = os.environ.get("RANK", "0") == "0"
    if first:
        run.write_record(out, record, settings)
    if site is not None:
        from emo_select.pretrain.slurm import submit

        say(f"Slurm job {submit(out, record.processes, site)} runs {out}; the same command goes on with it.")
        return
    if record.processes > 1 and "WORLD_SIZE" not in os.environ:
        run.launch(out, record.processes)
    else:
        from emo_select.pretrain.engine.work import carry_out

        carry_out(out)
    if first:
        _draw(out)
        say(f"Checkpoints, metrics and plots: {out}")


def _draw(out: Path) -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is not None:
        from emo_select.pretrain.plots import draw

        draw(out)


def _modularity(out: Path, keep_ks: list[str], tasks: list[str], steps: int, limit: int | None) -> None:
    from emo_select.cli.common import listed
    from emo_select.pipeline.modularity import evaluate_steps

    evaluate_steps(out, listed(keep_ks), listed(tasks), steps, limit=limit)


def doctor(as_json: AsJson = False) -> None:
    """Say what this machine has of what pretraining uses, and what each missing part means."""
    from emo_select.pretrain.doctor import examine

    found = examine()
    if as_json:
        emit([part._asdict() for part in found])
        return
    for part in found:
        typer.echo(f"{'ok     ' if part.ok else 'missing'}  {part.name:<22}{part.found}")
        if not part.ok:
            typer.echo(f"         {part.means}")


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command(rich_help_panel="Pretraining")(pretrain)
    app.command(rich_help_panel="Pretraining")(doctor)
