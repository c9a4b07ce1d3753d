"""The command line: reads words, calls a verb, prints. No logic of its own; each verb is imported where it is called.

Exit codes: 0 done, 1 the work failed, 2 the person's input, 75 stopped and the same command goes on, 130 interrupted.
"""

import argparse
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

MEANT = {"train": "fit run resume", "evaluate": "test eval score", "predict": "infer classify", "generate": "sample draw write"}
VERBS = {word: verb for verb, words in MEANT.items() for word in words.split()}  # what people call a verb elsewhere
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
FOLLOWS = os.environ.get("RANK", "0") != "0"  # one of several processes that torchrun has started, and not the first
ALIASES = {"epochs": "train.epochs", "batch": "train.batch", "lr": "optim.lr", "seed": "train.seed"}


class Parser(argparse.ArgumentParser):
    """argparse, whose faults are ours: what, found, do."""

    def _print_message(self, message: str, file: Any = None) -> None:
        _print(message.rstrip())

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            near = VERBS.get(value) or next(iter(difflib.get_close_matches(value, list(action.choices), 1)), "")
            what = _('there is no verb "{name}"') if action.dest == "verb" else _('there is no list "{name}"')
            found = _("there are {names}").format(names=", ".join(action.choices))
            if near in action.choices:
                found = _("did you mean: {command}").format(command=f"{self.prog} {near}")
            raise UserError(what.format(name=value), found, _("see {command} --help").format(command=self.prog), name="usage")

    def error(self, message: str) -> Any:
        do = _("see {command} --help; what begins with a dash and is no option stands after --")
        raise UserError(message, "", do.format(command=self.prog), name="usage")


def parser() -> Parser:
    gettext.bindtextdomain("cloche", str(Path(__file__).parent / "lang"))  # argparse looks its own words up in the global domain
    gettext.textdomain("cloche")
    about = _("From your own data to a trained, measured, explained network.")
    top = Parser(prog="cloche", description=about, epilog=_("Start with: cloche train digits"), allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"cloche {__version__}", help=_("show program's version number and exit"))
    verbs = top.add_subparsers(dest="verb", metavar=_("VERB"))

    def verb(name: str, does: str, takes_run: bool = True) -> Parser:
        p = verbs.add_parser(name, help=does, description=does, allow_abbrev=False)
        p.add_argument("--json", action="store_true", help=_("one JSON object on stdout"))
        if takes_run:
            p.add_argument("run_folder", metavar="RUN")
        return p

    p = verb("train", _("train a recipe, or go on with its unfinished run"), takes_run=False)
    p.add_argument("recipe", metavar="RECIPE", help=_("a recipe that comes with cloche, a .toml file, or a path to your data"))
    p.add_argument("--data", metavar="PATH", help=_("the data, in place of the recipe's"))
    _settable(p)
    p.add_argument("--out", metavar="RUN", help=_("the run folder; runs/RECIPE if not given"))
    p.add_argument("--folds", type=int, default=0, metavar="F", help=_("F runs that test on every example once"))
    p.add_argument("--seeds", type=int, default=0, metavar="S", help=_("S runs that differ in their seed"))
    p.add_argument("--again", action="store_true", help=_("start anew"))
    p.add_argument("--rewind", action="store_true", help=_("go on without the examples whose step gave no finite number"))
    p.add_argument(
        "--save-seconds", type=float, default=0.0, metavar="S", help=_("a checkpoint every S seconds; else as many as cost 1 %%")
    )
    p.add_argument("--allow-change", action="append", default=[], metavar="FIELD", help=_("go on although this field differs"))
    p = verb("verify-resume", _("kill a training on this machine, go on with it, compare the bits"), takes_run=False)
    p.add_argument("recipe", metavar="RECIPE", help=_("a recipe that comes with cloche, a .toml file, or a path to your data"))
    p.add_argument("--data", metavar="PATH", help=_("the data, in place of the recipe's"))
    p.add_argument("--kills", type=int, default=3, metavar="N", help=_("how often it is killed"))
    _settable(p)
    p = verb("evaluate", _("the figures of a run, or of a run on other data"))
    p.add_argument("--data", metavar="PATH", help=_("other data with the same classes"))
    p = verb("predict", _("a run's answer for each input"))
    p.add_argument("inputs", nargs="+", metavar="INPUT", help=_("a file, or words or a row of numbers in quotes"))
    p = verb("generate", _("text or pictures from a run"))
    p.add_argument("prompt", nargs="?", default="", metavar="PROMPT")
    for name, text in GENERATE.items():
        p.add_argument(f"--{name}", metavar=name[0].upper(), help=text)
    p = verb("explain", _("the layers of a recipe, or what happens inside a run on one input"), takes_run=False)
    p.add_argument("what", metavar="RECIPE|RUN")
    told = _("a file, or words or a row of numbers in quotes; else the first validation example")
    p.add_argument("input", nargs="?", metavar="INPUT", help=told)
    p.add_argument("--label", metavar="K", help=_("the true class; else the predicted one"))
    p.add_argument("--at", metavar="LAYER:C,Y,X", help=_("show the products whose sum is one number of a map, such as conv1:0,5,7"))
    p.add_argument("--out", metavar="FOLDER", help=_("where the pictures go; RUN/report if not given"))
    p.add_argument("--data", metavar="PATH", help=_("the data, in place of the recipe's"))
    _settable(p)
    verb("check", _("what this machine can do, and what would make it faster"), takes_run=False)
    verb("report", _("write a run's page again"))
    p = verb("list", _("recipes, nets, tasks, data, optimizers, every key; or the JSON schema"), takes_run=False)
    p.add_argument("what", nargs="?", default="recipes", choices=["recipes", "nets", "tasks", "data", "optim", "train", "schema"])
    return top


def _settable(p: Parser) -> None:
    told = _("a key of the recipe, such as optim.lr=0.01; may be repeated")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=told)
    for name, key in ALIASES.items():
        p.add_argument(f"--{name}", metavar=name[0].upper(), help=_("short for --set {key}=…").format(key=key))


def run(argv: list[str]) -> int:
    """Run a command line; returns the exit code. Faults are told on stderr, with --json on stdout too."""
    as_json = "--json" in argv
    os.environ.update({name: os.environ.get(name, "1") for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")})  # no network
    try:
        args = parser().parse_args(argv)
        if not args.verb:
            parser().print_help()
            return DONE
        found, text = _done(args)
        if not FOLLOWS:
            _print(json.dumps(found) if as_json else text)
        return DONE
    except UserError as fault:
        if fault.goes_on or fault.name in ("disk-full", "write-failed"):  # what goes on, in full: without --again
            several = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", ""), "-m"] * ("RANK" in os.environ)
            command = shlex.join([*several, "cloche", *(word for word in argv if not (fault.goes_on and word == "--again"))])
            fault.do = "\n  ".join(filter(None, (fault.do, command)))
        return _tell(fault.retold(argv) if hasattr(fault, "retold") else fault, as_json)
    except KeyboardInterrupt:
        return _tell(UserError(_("interrupted"), code=INTERRUPTED, name="interrupted"), as_json)
    except OSError as fault:  # the machine's: no room for the output, a name too long, a folder that may not be read
        do, code = _("look at that path or disk, then type it again"), WRONG_INPUT if fault.filename else FAILED
        told = UserError(fault.strerror or str(fault), str(fault.filename or ""), do, code=code, name="system")
        return _tell(told, as_json and bool(fault.filename))
    except Exception as fault:  # a bug of ours: say so, keep the trace for the report, not for the eye
        trace = Path(f"cloche-fault-{os.getpid()}.txt")
        try:
            trace.write_text(traceback.format_exc(), encoding="utf-8")
        except OSError:
            traceback.print_exc()
        what, found = _("cloche itself failed: {why}"), _("the trace is in {path}").format(path=trace)
        what = what.format(why=f"{type(fault).__name__}: {fault}")
        return _tell(UserError(what, found, _("please report it"), code=FAILED, name="bug"), as_json)


def _tell(fault: UserError, as_json: bool) -> int:
    from cloche.training.log import say  # here: it costs nothing, and is not needed on the way to --help

    parallel = sys.modules.get("cloche.training.parallel")
    alone = fault.name not in ("follows", "stopped", "not-finite") and parallel and parallel.joined  # else the first one finds it too
    if FOLLOWS and not alone:
        return fault.code
    say(str(fault))
    if as_json:
        _print(json.dumps({"error": fault.as_dict()}))
    return fault.code


def _print(text: str, end: str = "\n") -> None:
    from cloche.training.log import printable

    if not text:  # the terminal may be gone by now, which is no fault
        return
    try:
        print(printable(text, sys.stdout), end=end, flush=True)
    except BrokenPipeError:  # whoever reads has left, like `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _sets(args: argparse.Namespace) -> dict[str, Any]:
    from cloche.recipe import parse_set

    short = [f"{key}={getattr(args, name)}" for name, key in ALIASES.items() if getattr(args, name) is not None]
    return dict(parse_set(text) for text in [*args.set, *short])


def _done(args: argparse.Namespace) -> tuple[Any, str]:
    """What a verb found, for --json, and as text. Each is imported where it is called: --help must not wait for torch."""
    from cloche.use import story
    from cloche.use.model import load

    match args.verb:
        case "train":
            from cloche.use.train import Options, many, train

            given = {"out": args.out, "again": args.again, "allow_change": tuple(args.allow_change), "rewind": args.rewind}
            options = Options(t0=start.T0, save_s=args.save_seconds, **given)
            if args.folds or args.seeds:
                found = many(args.recipe, args.data, _sets(args), options, args.folds, args.seeds)
                return found, story.summary_text(found)
            return story.plain(train(args.recipe, args.data, _sets(args), options)), ""
        case "verify-resume":
            from cloche.use.verify import verify_resume

            return verify_resume(args.recipe, args.data, _sets(args), args.kills)
        case "evaluate":
            model = load(args.run_folder)
            results = model.evaluate(args.data)
            return story.plain(model, results), story.figures_text(model, results)
        case "predict":
            answers = load(args.run_folder).predict(args.inputs)
            found = [{"input": given, **answer} for given, answer in zip(args.inputs, answers, strict=True)]
            return {"predictions": found}, story.answers_text(found)
        case "generate":
            from cloche.use.generate import generate, how_of

            given = {key: v for name in GENERATE if (v := getattr(args, key := name.replace("-", "_"))) is not None}
            write = (lambda text: None) if args.json else (lambda text: _print(text, ""))
            found = generate(args.run_folder, args.prompt, how_of(given), write)
            return found, "\n".join(o["path"] for o in found["outputs"] if "path" in o)
        case "explain":
            from cloche.use.explain import explain

            return explain(args.what, args.input, label=args.label, at=args.at, out=args.out, data=args.data, sets=_sets(args))
        case "check":
            from cloche.use.check import check

            return check()
        case "report":
            from cloche.use.report import report

            path = str(report(args.run_folder))
            return {"report": path}, path
    from cloche.use.catalogue import catalogue

    return catalogue(args.what)
