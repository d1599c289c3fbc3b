#!/usr/bin/env bash
# Unpacks the bundle beside this script; no network, no pip.
#
#     . .gpu-bundle/install.sh [FOLDER]      # /tmp/launcher-gpu when none is given
#
# Source it: it puts the packages on PYTHONPATH. `$LAUNCHER_GPU_PROJECT` is then the launcher's source as it was bundled.
_bundle=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
_folder=${1:-/tmp/launcher-gpu}
mkdir -p "$_folder"
python3 - "$_bundle" "$_folder" <<'PYTHON'
import compileall, sys, tarfile, time

bundle, folder = sys.argv[1:]
built_for, here = "@PYTHON@", f"{sys.version_info.major}.{sys.version_info.minor}"
if built_for != here:
    sys.exit(f"error: the bundle is for Python {built_for}, python3 is {here}; build it with --python {here}")
begun = time.monotonic()
for name in ("site", "project"):
    with tarfile.open(f"{bundle}/{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
# Some twenty processes import the packages at the first start; each would compile them.
compileall.compile_dir(folder, quiet=2, workers=0)
print(f"unpacked into {folder} in {time.monotonic() - begun:.1f} s")
PYTHON
_code=$?
export PYTHONPATH=$_folder/site${PYTHONPATH:+:$PYTHONPATH}
export LAUNCHER_GPU_PROJECT=$_folder/project
[ "$_code" -eq 0 ]
