"""The command line: reads words, calls a verb, prints. No logic of its own; each verb is imported inside its function.

Exit codes: 0 done, 1 the work failed, 2 the person's input, 75 stopped and the same command goes on, 130 interrupted.
"""

import argparse
from collections.abc import Callable
import difflib
import gettext
import json
import os
from pathlib import Path
import shlex
import sys
import traceback
from typing import Any

from cloche import __version__, start
from cloche.errors import DONE, FAILED, INTERRUPTED, WRONG_INPUT, UserError
from cloche.words import _

VERBS = {
    "fit": "train",
    "run": "train",
    "resume": "train",
    "test": "evaluate",
    "eval": "evaluate",
    "score": "evaluate",
    "infer": "predict",
    "classify": "predict",
    "sample": "generate",
    "draw": "generate",
    "write": "generate",
}
GENERATE = {
    "n": _("how many"),
    "seed": _("what the randomness hangs on"),
    "length": _("text: at most so many tokens"),
    "temperature": _("text: 0 always takes the likeliest token"),
    "top-k": _("text: only the k likeliest tokens; 0 for all"),
    "top-p": _("text: only the likeliest tokens that make up this share"),
    "steps": _("pictures: denoising steps"),
    "guidance": _("pictures: how strongly the prompt pulls; 1 for no guidance"),
    "out": _("pictures: the file; PROMPT.png if not given"),
}
ALIASES = {"epochs": "train.epochs", "batch": "train.batch", "lr": "optim.lr", "seed": "train.seed"}


class Parser(argparse.ArgumentParser):
    """argparse, whose faults are ours: what, found, do."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given, allow_abbrev=False)

    def _print_message(self, message: str, file: Any = None) -> None:
        _print(message.rstrip())

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            near = VERBS.get(value) or next(iter(difflib.get_close_matches(value, list(action.choices), 1)), "")
            what = _('there is no verb "{name}"') if action.dest == "verb" else _('there is no list "{name}"')
            found = (
                _("did you mean: {command}").format(command=f"{self.prog} {near}")
                if near in action.choices
                else _("there are {names}").format(names=", ".join(action.choices))
            )
            raise UserError(what.format(name=value), found, _("see {command} --help").format(command=self.prog), name="usage")

    def error(self, message: str) -> Any:
        do = _("see {command} --help; what begins with a dash and is no option stands after --")
        raise UserError(message, "", do.format(command=self.prog), name="usage")


def parser() -> Parser:
    gettext.bindtextdomain("cloche", str(Path(__file__).parent / "lang"))  # argparse looks its own words up in the global domain
    gettext.textdomain("cloche")
    top = Parser(
        prog="cloche",
        description=_("From your own data to a trained, measured, explained network."),
        epilog=_("Start with: cloche train digits"),
    )
    top.add_argument("--version", action="version", version=f"cloche {__version__}", help=_("show program's version number and exit"))
    verbs = top.add_subparsers(dest="verb", metavar=_("VERB"), parser_class=Parser)

    def verb(name: str, does: str, run: Callable[[argparse.Namespace], Any]) -> Parser:
        p = verbs.add_parser(name, help=does, description=does)
        p.add_argument("--json", action="store_true", help=_("one JSON object on stdout"))
        p.set_defaults(run=run)
        return p

    p = verb("train", _("train a recipe, or go on with its unfinished run"), _train)
    p.add_argument("recipe", metavar="RECIPE", help=_("a recipe that comes with cloche, a .toml file, or a path to your data"))
    p.add_argument("--data", metavar="PATH", help=_("the data, in place of the recipe's"))
    _settable(p)
    p.add_argument("--out", metavar="RUN", help=_("the run folder; runs/RECIPE if not given"))
    p.add_argument("--folds", type=int, default=0, metavar="F", help=_("F runs that test on every example once"))
    p.add_argument("--seeds", type=int, default=0, metavar="S", help=_("S runs that differ in their seed"))
    p.add_argument("--again", action="store_true", help=_("start anew"))
    p.add_argument("--allow-change", action="append", default=[], metavar="FIELD", help=_("go on although this field differs"))
    p = verb("evaluate", _("the figures of a run, or of a run on other data"), _evaluate)
    p.add_argument("run_folder", metavar="RUN")
    p.add_argument("--data", metavar="PATH", help=_("other data with the same classes"))
    p = verb("predict", _("a run's answer for each input"), _predict)
    p.add_argument("run_folder", metavar="RUN")
    p.add_argument("inputs", nargs="+", metavar="INPUT", help=_("a file, or words or a row of numbers in quotes"))
    p = verb("generate", _("text or pictures from a run"), _generate)
    p.add_argument("run_folder", metavar="RUN")
    p.add_argument("prompt", nargs="?", default="", metavar="PROMPT")
    for name, text in GENERATE.items():
        p.add_argument(f"--{name}", metavar=name[0].upper(), help=text)
    p = verb("explain", _("the layers of a recipe, or what happens inside a run on one input"), _explain)
    p.add_argument("what", metavar="RECIPE|RUN")
    p.add_argument(
        "input", nargs="?", metavar="INPUT", help=_("a file, or words or a row of numbers in quotes; else the first validation example")
    )
    p.add_argument("--label", metavar="K", help=_("the true class; else the predicted one"))
    p.add_argument("--at", metavar="LAYER:C,Y,X", help=_("show the products whose sum is one number of a map, such as conv1:0,5,7"))
    p.add_argument("--out", metavar="FOLDER", help=_("where the pictures go; RUN/report if not given"))
    p.add_argument("--data", metavar="PATH", help=_("the data, in place of the recipe's"))
    _settable(p)
    p = verb("report", _("write a run's page again"), _report)
    p.add_argument("run_folder", metavar="RUN")
    p = verb("list", _("recipes, nets, tasks, data, optimizers, every key; or the JSON schema"), _list)
    p.add_argument("what", nargs="?", default="recipes", choices=["recipes", "nets", "tasks", "data", "optim", "train", "schema"])
    return top


def _settable(p: Parser) -> None:
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help=_("a key of the recipe, such as optim.lr=0.01; may be repeated")
    )
    for name, key in ALIASES.items():
        p.add_argument(f"--{name}", metavar=name[0].upper(), help=_("short for --set {key}=…").format(key=key))


def run(argv: list[str]) -> int:
    """Run a command line; returns the exit code. Faults are told on stderr, with --json on stdout too."""
    as_json = "--json" in argv
    try:
        _no_network()
        args = parser().parse_args(argv)
        if not args.verb:
            parser().print_help()
            return DONE
        found, text = args.run(args)
        _print(json.dumps(found) if as_json else text)
        return DONE
    except UserError as fault:
        if fault.goes_on or fault.name in ("disk-full", "write-failed"):  # what goes on, in full: without --again
            command = shlex.join(["cloche", *(word for word in argv if not (fault.goes_on and word == "--again"))])
            fault.do = "\n  ".join(filter(None, (fault.do, command)))
        _tell(fault.retold(argv) if hasattr(fault, "retold") else fault, as_json)
        return fault.code
    except KeyboardInterrupt:
        _tell(UserError(_("interrupted"), code=INTERRUPTED, name="interrupted"), as_json)
        return INTERRUPTED
    except OSError as fault:  # the machine's: no room for the output, a name too long, a folder that may not be read
        _tell(
            UserError(
                fault.strerror or str(fault), str(fault.filename or ""), _("look at that path or disk, then type it again"), name="system"
            ),
            as_json and bool(fault.filename),
        )
        return WRONG_INPUT if fault.filename else FAILED
    except Exception as fault:  # a bug of ours: say so, keep the trace for the report, not for the eye
        trace = Path(f"cloche-fault-{os.getpid()}.txt")
        try:
            trace.write_text(traceback.format_exc(), encoding="utf-8")
        except OSError:
            traceback.print_exc()
        _tell(
            UserError(
                _("cloche itself failed: {why}").format(why=f"{type(fault).__name__}: {fault}"),
                _("the trace is in {path}").format(path=trace),
                _("please report it"),
                code=FAILED,
                name="bug",
            ),
            as_json,
        )
        return FAILED


def _no_network() -> None:
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "1")


def _tell(fault: UserError, as_json: bool) -> None:
    from cloche.training.log import say  # here: it costs nothing, and is not needed on the way to --help

    say(str(fault))
    if as_json:
        _print(json.dumps({"error": fault.as_dict()}))


def _print(text: str, end: str = "\n") -> None:
    from cloche.training.log import printable

    try:
        print(printable(text, sys.stdout), end=end if text else "", flush=True)
    except BrokenPipeError:  # whoever reads has left, like `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _sets(args: argparse.Namespace) -> dict[str, Any]:
    from cloche.recipe import parse_set

    short = [f"{key}={getattr(args, name)}" for name, key in ALIASES.items() if getattr(args, name) is not None]
    return dict(parse_set(text) for text in [*args.set, *short])


def _train(args: argparse.Namespace) -> tuple[Any, str]:
    from cloche.use import story
    from cloche.use.train import Options, many, train

    options = Options(t0=start.T0, out=args.out, again=args.again, allow_change=tuple(args.allow_change))
    if args.folds or args.seeds:
        found = many(args.recipe, args.data, _sets(args), options, args.folds, args.seeds)
        return found, story.summary_text(found)
    return story.plain(train(args.recipe, args.data, _sets(args), options)), ""


def _evaluate(args: argparse.Namespace) -> tuple[Any, str]:
    from cloche.use import story
    from cloche.use.model import load

    model = load(args.run_folder)
    results = model.evaluate(args.data)
    return story.plain(model, results), story.figures_text(model, results)


def _predict(args: argparse.Namespace) -> tuple[Any, str]:
    from cloche.use import story
    from cloche.use.model import load

    answers = load(args.run_folder).predict(args.inputs)
    found = [{"input": given, **answer} for given, answer in zip(args.inputs, answers, strict=True)]
    return {"predictions": found}, story.answers_text(found)


def _generate(args: argparse.Namespace) -> tuple[Any, str]:
    from cloche.use.generate import generate, how_of

    given = {name.replace("-", "_"): v for name in GENERATE if (v := getattr(args, name.replace("-", "_"))) is not None}
    write = (lambda text: None) if args.json else (lambda text: _print(text, ""))
    found = generate(args.run_folder, args.prompt, how_of(given), write)
    return found, "\n".join(o["path"] for o in found["outputs"] if "path" in o)


def _explain(args: argparse.Namespace) -> tuple[Any, str]:
    from cloche.use.explain import explain

    return explain(args.what, args.input, label=args.label, at=args.at, out=args.out, data=args.data, sets=_sets(args))


def _report(args: argparse.Namespace) -> tuple[Any, str]:
    from cloche.use.report import report

    path = report(args.run_folder)
    return {"report": str(path)}, str(path)


def _list(args: argparse.Namespace) -> tuple[Any, str]:
    from cloche.use.catalogue import catalogue

    return catalogue(args.what)
