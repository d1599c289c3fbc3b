#!/usr/bin/env bash
# Collects what a bare GPU machine without network lacks, so that `run.py` runs there: at most 60 MiB.
#
#     tests/gpu/bundle.sh [--python 3.12] [--output .gpu-bundle]
#
# The output, below the repository unless it is a whole path, holds `site.tar.xz` (packages, stripped), `project.tar.xz`
# (the launcher's source and tests/gpu, for a machine without a checkout) and `install.sh`, which needs a Python and
# nothing else. Models and data are made by `run.py` from a seed. Runs on the client; needs pip, git, xz and a package
# index.
set -euo pipefail
cd "$(dirname "$0")/../.."

python_version=3.12
output=.gpu-bundle
limit_mib=60
while [ $# -gt 0 ]; do
    case "$1" in
    --python) python_version=$2 ;;
    --output) output=$2 ;;
    *) echo "error: unknown option $1; options are --python VERSION and --output DIRECTORY" >&2 && exit 2 ;;
    esac
    shift 2
done
# Any Python with a recent pip can fetch for another one.
pip=("${PYTHON:-python3}" -m pip --quiet --disable-pip-version-check)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$work/site

# pip matches each manylinux tag exactly, so every one in use is named.
platforms=()
for tag in 2_28 2_27 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${tag}_x86_64"); done
for tag in 2014 2010 1; do platforms+=(--platform "manylinux${tag}_x86_64"); done
"${pip[@]}" install --target "$site" --no-deps --no-compile --only-binary=:all: --implementation cp \
    --python-version "$python_version" "${platforms[@]}" -c constraints.txt -r tests/gpu/bundle.txt

# DeepSpeed has no wheel; built without torch it compiles nothing and is the same for every Python.
DS_BUILD_OPS=0 "${pip[@]}" wheel --no-deps --wheel-dir "$work" "$(grep '^deepspeed==' constraints.txt)"
"${pip[@]}" install --target "$site" --no-deps --no-compile "$work"/deepspeed-*.whl

# Files as they are in the checkout, also those that are not committed yet.
mkdir "$work/project"
git ls-files -z --cached --others --exclude-standard launcher pyproject.toml README.md LICENSE tests/gpu |
    while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done |
    tar --null --files-from=- -c | tar -x -C "$work/project"

# Ray's Java, its web page and libraries that a fine-tuning run never imports; a worker process imports the rest.
(cd "$site" && rm -rf bin share ray/jars ray/cpp ray/rllib ray/llm ray/dashboard/client/build plotly/package_data/datasets)
find "$site" -name '*.map' -delete
find "$site" -type d \( -name tests -o -name __pycache__ \) -prune -exec rm -rf {} +

mkdir -p "$output"
rm -f "$output"/site.tar.xz "$output"/project.tar.xz "$output"/install.sh
tar -C "$work" --sort=name --owner=0 --group=0 -c site | xz -T0 -8 >"$output/site.tar.xz"
tar -C "$work" --sort=name --owner=0 --group=0 -c project | xz -T0 -8 >"$output/project.tar.xz"
sed "s/@PYTHON@/$python_version/" tests/gpu/install.sh >"$output/install.sh"
chmod +x "$output/install.sh"

size=$(du -s --apparent-size --block-size=1 "$output" | cut -f1)
du -h --apparent-size "$output"/*
echo "$output: $(awk "BEGIN {printf \"%.1f\", $size / 1048576}") MiB for Python $python_version"
[ "$size" -lt $((limit_mib * 1048576)) ] || { echo "error: $output has $limit_mib MiB or more" >&2 && exit 1; }
