"""Print what pip must install before the package itself, as pyproject.toml pins it: `torch`, or the build requirements.

python .ci/requirements.py torch      -> torch==2.13.0
python .ci/requirements.py build      -> one requirement a line
"""

import pathlib
import sys
import tomllib

project = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())
if sys.argv[1:] == ["torch"]:
    print(next(line for line in project["project"]["dependencies"] if line.startswith("torch==")))
elif sys.argv[1:] == ["build"]:
    print("\n".join(project["build-system"]["requires"]))
else:
    sys.exit("usage: python .ci/requirements.py torch|build")
