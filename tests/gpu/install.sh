#!/usr/bin/env bash
# Unpacks the bundle beside this script; no network, no pip.
#
#     . .gpu-bundle/install.sh
#
# Source it: it puts the packages, unpacked below $LAUNCHER_GPU_FOLDER (/tmp/launcher-gpu), on PYTHONPATH.
# $LAUNCHER_GPU_PROJECT is then the launcher's source as it was bundled.
_bundle=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
_folder=${LAUNCHER_GPU_FOLDER:-/tmp/launcher-gpu}
mkdir -p "$_folder"
python3 - "$_bundle" "$_folder" <<'PYTHON'
import sys, tarfile, time

bundle, folder = sys.argv[1:]
built_for, here = "@PYTHON@", f"{sys.version_info.major}.{sys.version_info.minor}"
if built_for != here:
    sys.exit(f"error: the bundle is for Python {built_for}, python3 is {here}; build it with --python {here}")
begun = time.monotonic()
for name in ("site", "project"):
    with tarfile.open(f"{bundle}/{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
print(f"unpacked into {folder} in {time.monotonic() - begun:.1f} s")
PYTHON
_code=$?
# Some twenty processes import the packages at the first start; each would compile them.
[ "$_code" -ne 0 ] || python3 -m compileall -qq -j 0 "$_folder" || true  # templates among them are no Python
export PYTHONPATH=$_folder/site${PYTHONPATH:+:$PYTHONPATH}
export LAUNCHER_GPU_PROJECT=$_folder/project
[ "$_code" -eq 0 ]
