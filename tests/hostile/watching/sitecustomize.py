"""Put on PYTHONPATH, this makes a Python program tell of everything that unpickles, and of files that it must not open.

Each line of the file that CADAPTER_WATCH_LOG names is a JSON object: ``event``, ``what`` and ``stack``, the files of
the code that did it, innermost first. CADAPTER_WATCH_ROOT is the directory of the user's files.

What is watched: the audit event ``pickle.find_class``; ``pickle``'s and ``_pickle``'s load, loads and Unpickler;
``torch.load`` and torch's own unpickler for ``weights_only``, which raises no such event; the opening of files whose
names end as pickles or Python code do, and the compiling of code that lies among the user's files; ``os.system``.
"""

import _pickle
import importlib.machinery
import json
import os
import pickle
import sys

LOG, ROOT = os.environ.get("CADAPTER_WATCH_LOG"), os.environ.get("CADAPTER_WATCH_ROOT", "")
ENDINGS = (".py", ".pyc", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".npy", ".npz", ".ckpt", ".so", ".gguf")
OWN = ("tokens.bin", "trained.bin")  # what cadapter writes and reads itself while it tokenises: plain numbers


def tell(event: str, what: object) -> None:
    """Append a line; opening the log is watched too, and not told."""
    frame, stack = sys._getframe(1), []
    while frame is not None:
        stack.append(frame.f_code.co_filename)
        frame = frame.f_back
    line = json.dumps({"event": event, "what": str(what)[:200], "stack": stack}) + "\n"
    descriptor = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def among_the_users(path: object) -> bool:
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    return isinstance(path, str) and os.path.realpath(path).startswith(ROOT + os.sep) and os.path.exists(path)


def audit(event: str, arguments: tuple) -> None:
    if event == "pickle.find_class":
        tell(event, arguments)
    elif event == "open":
        path = arguments[0]
        if isinstance(path, (str, bytes)):
            name = os.fsdecode(path)
            if name.endswith(ENDINGS) and not name.endswith(OWN) and among_the_users(path):
                tell("open", name)
    elif event == "compile":
        if among_the_users(arguments[1]):
            tell(event, arguments[1])
    elif event == "os.system":
        tell(event, arguments[0])


def told(name: str, function: object) -> object:
    def wrapper(*arguments, **options):
        source = arguments[0] if arguments else options
        tell(name, getattr(source, "name", None) or repr(source))
        return function(*arguments, **options)

    return wrapper


class Unpickler(_pickle.Unpickler):
    """The real one, which tells of itself; others derive from it."""

    def __init__(self, file, *arguments, **options):
        tell("pickle.Unpickler", getattr(file, "name", None) or repr(file))
        super().__init__(file, *arguments, **options)


TORCH = {"torch.serialization": ("load",), "torch._weights_only_unpickler": ("load",)}


class Finder:
    """Patches torch's modules once they are imported."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in TORCH:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            for function in TORCH[name]:
                setattr(module, function, told(f"{name}.{function}", getattr(module, function)))

        spec.loader.exec_module = exec_module
        return spec


if LOG:
    for module in (pickle, _pickle):
        for function in ("load", "loads"):
            setattr(module, function, told(f"pickle.{function}", getattr(module, function)))
        module.Unpickler = Unpickler
    sys.meta_path.insert(0, Finder)
    sys.addaudithook(audit)
