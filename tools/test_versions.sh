#!/usr/bin/env bash
# tools/test_versions.sh oldest|newest|kernels [options]: tests the package on the versions that docs/installation.md names.
#
# oldest, newest   builds the package from source in build/oldest or build/newest, an environment of its own, and tests the installed
#                  package from a folder without its sources. With "newest" it also compiles a few Triton kernels.
# kernels          compiles the Triton kernels of this checkout that have changed, with the oldest Triton, in build/oldest. The options
#                  are passed to python -m benchmarks.resources.
#
# "oldest" and "kernels" need Python 3.12: python3.12 on the PATH, pyenv's, or the one that PYTHON312 names.
set -euo pipefail
cd "$(dirname "$0")/.."

# Tries each candidate, because the python3.12 on the PATH may be a pyenv stub that cannot run.
find_python312() {
    local candidate
    for candidate in ${PYTHON312:-python3.12 $HOME/.pyenv/versions/3.12*/bin/python3.12}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "tools/test_versions.sh: found no Python 3.12; set PYTHON312 to its path" >&2
    return 1
}

common=(tests/api/test_ops.py tests/api/test_losses.py tests/api/test_properties.py)
what=${1:-}
case "$what" in
oldest | kernels)
    environment=oldest
    python=$(find_python312)
    versions=(torch==2.11.0 triton==3.6.0)
    extras=()
    tests=("${common[@]}")
    kernels=() # `make resources` compiles them
    ;;
newest)
    environment=newest
    python=${PYTHON:-python3}
    versions=(torch==2.14.1 triton==3.8.0)
    extras=(lightly matplotlib pytorch-metric-learning scikit-learn tqdm)
    tests=("${common[@]}" tests/contract tests/api/test_training.py tests/api/test_gradcache.py tests/api/test_compat.py)
    kernels=(--targets 90 --dtypes bfloat16 --dims 128) # there is no committed table for this version
    ;;
*)
    sed -n '2,9s/^# \?//p' "$0" >&2
    exit 2
    ;;
esac

here=build/$environment
if [ ! -e "$here/made" ]; then
    echo "==> creating $here with $("$python" --version)"
    "$python" -m venv --clear "$here"
    touch "$here/made"
fi
echo "==> installing ${versions[*]} and what the tests need, some gigabytes at first"
in_it=$PWD/$here/bin/python
grep -v '^torch\|^triton' constraints.txt >"$here/constraints.txt"
"$in_it" -m pip install --quiet --constraint "$here/constraints.txt" "${versions[@]}" \
    ninja 'setuptools>=77' hypothesis numpy pytest pytest-xdist rich "${extras[@]}"
if [ "$what" = kernels ]; then
    PYTHONPATH=. exec "$in_it" -m benchmarks.resources "${@:2}"
fi
echo "==> building the package from source"
CLOP_NATIVE=1 CLOP_CUDA_ARCHS="${CLOP_CUDA_ARCHS:-90}" "$in_it" -m pip install --quiet --no-deps --no-build-isolation --force-reinstall .

# Tests run from a copy without the sources, so that they import the installed package.
rm -rf "$here/run"
mkdir "$here/run"
cp -r tests benchmarks pyproject.toml "$here/run"
cd "$here/run"
"$in_it" -m clop_kernels info
OMP_NUM_THREADS=1 "$in_it" -m pytest -q -p no:cacheprovider -n logical "${tests[@]}"
if [ "${#kernels[@]}" -gt 0 ]; then
    "$in_it" -m benchmarks.resources "${kernels[@]}"
fi
