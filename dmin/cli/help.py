"""The help pages, by the standard library alone, so that they appear immediately."""

import textwrap

from dmin.cli.config.groups import groups
from dmin.cli.config.subtrees import reads

COMMANDS = {
    "train": "Train a model on a dataset, or on a subset of it.",
    "collect": "Collect the compressed gradients of the training examples into a store (once).",
    "doctor": "Check that the gradients of your model are right, and predict the cost of "
    "collecting.",
    "sample": "Generate query images, each with the prompt and seed that made it.",
    "retrieve": "Find the most influential training examples of each query image.",
    "serve": "Retrieve in a browser, with the model kept loaded.",
    "outliers": "Find unusual training examples: rare ones, or wrongly labelled ones.",
    "losses": "Show the loss of every training image, and whether the model is over-fitted.",
    "evaluate": "Measure how far the answers can be trusted, against ground truth.",
    "status": "Show the progress and the processes of a running or dead collection.",
    "models": "List the supported model families, and why other pipelines are refused.",
    "store": "Inspect, verify, merge, fold, convert, compact and export stores.",
    "repeat": "Repeat an earlier run, and report what differs.",
    "demo": "Run all steps on a small model, in minutes on a laptop.",
}

# Commands that compose no configuration; each has a page of its own in dmin.cli.tools.
TOOLS = ("status", "models", "store", "repeat")

# What the example of each command says beyond `experiment=digits`, with which all of them run.
_EXAMPLES = {
    "train": " train.steps=500 name=short",
    "doctor": "",
    "collect": " sketch.dim=1024",
    "sample": " queries.per_prompt=4",
    "retrieve": " method=grad_cos retrieve.k=20",
    "serve": " serve.port=0",
    "outliers": " method=datainf",
    "losses": " noise.draws=4",
    "evaluate": "",
    "demo": " seed=1 name=other",
}
# The words of a line that are no settings.
_WORDS = dict.fromkeys(
    ("doctor", "collect", "serve", "outliers", "evaluate"), " [STORE] [--limit N]"
) | {
    "losses": " [STORE] [HELD_OUT ...] [--limit N]",
    "sample": " [STORE] [--prompt TEXT ...]",
    "retrieve": " [STORE] [PICTURE ...] [--against FOLDER] [--prompt TEXT ...]"
    " [--concept TEXT --without TEXT] [--region X,Y,W,H | --mask FILE] [--places N]",
}
_STORE = """
A STORE is a folder that `dmin collect` wrote. It contains the settings of model, data and
loss; settings on the command line override them and are checked against the store. If the model has
moved, give --model PATH. For a store from elsewhere that names other code, add --trust.
"""
_WIDTH = 90


def release() -> str:
    """Return the version that is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("dmin")
    except PackageNotFoundError:
        return "(a checkout that is not installed)"


def overview() -> str:
    """Return what ``dmin --help`` prints."""
    commands = "\n".join(f"  {name:<10}{line}" for name, line in COMMANDS.items())
    return f"""\
dmin: which training examples made this diffusion model produce this image?

usage: dmin <command> [setting=value ...]
       dmin <command> --help | --cfg job
       dmin --help | --version

commands:
{commands}

Settings are Hydra overrides. `dmin <command> --help` lists the choices of each configuration
group, `dmin <command> --cfg job` prints all settings that it reads.
For shell completion: eval "$(dmin --shell-completion install=bash)"
"""


def page(command: str) -> str:
    """Return what ``dmin <command> --help`` prints, for commands with a configuration."""
    listed = {name: choices for name, choices in groups().items() if reads(command, name)}
    shown = "\n".join(_entry(group, choices) for group, choices in listed.items())
    digits = f"dmin {command} experiment=digits"
    return f"""\
{COMMANDS[command]}

usage: dmin {command}{_WORDS.get(command, "")} [setting=value ...] [Hydra options]
{_STORE if command in _WORDS else ""}
examples:
  {digits}{_EXAMPLES[command]}
  {digits} --cfg job      print the configuration and exit
  {digits} -m seed=0,1,2  one run for each value
  {digits} -q             print only results, warnings and errors

configuration groups (group=choice):
{shown}

For your own YAML files: --config-dir DIRECTORY. Settings are section.key=value, as --cfg job shows.
For Hydra's options: dmin {command} --hydra-help. For the traceback of an error:
HYDRA_FULL_ERROR=1 dmin {command} ...
"""


def _entry(group: str, choices: list[str]) -> str:
    indent = " " * 20
    lines = textwrap.wrap(
        ", ".join(choices), _WIDTH, initial_indent=indent, subsequent_indent=indent
    )
    head = f"  {group} "
    if len(head) > len(indent):
        return "\n".join([head.rstrip(), *lines])
    return "\n".join([head.ljust(len(indent)) + lines[0].lstrip(), *lines[1:]])
