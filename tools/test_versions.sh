#!/usr/bin/env bash
# tools/test_versions.sh oldest|newest|kernels: the package on the oldest and the newest versions that README.md names.
#
# In an environment of its own, build/oldest or build/newest, it is built from source and installed, then tested from a folder
# that has none of its sources; on the newest a few of Triton's kernels are compiled. "kernels" compiles those of the checkout
# that the table of the oldest version lacks, in build/oldest; what follows goes to python -m benchmarks.resources.
# PYTHON312 names the Python of the oldest, where it is neither python3.12 on the PATH nor one of pyenv's.
set -euo pipefail
cd "$(dirname "$0")/.."

# The python3.12 on the PATH may be a stub of pyenv's that runs nothing.
find_python312() {
    local candidate
    for candidate in ${PYTHON312:-python3.12 $HOME/.pyenv/versions/3.12*/bin/python3.12}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "tools/test_versions.sh: no Python 3.12 in PYTHON312, or on the PATH and in ~/.pyenv/versions if that is unset" >&2
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
    kernels=() # make resources compiles them
    ;;
newest)
    environment=newest
    python=${PYTHON:-python3}
    versions=(torch==2.14.1 triton==3.8.0)
    extras=(lightly matplotlib pytorch-metric-learning scikit-learn tqdm)
    tests=("${common[@]}" tests/contract tests/api/test_training.py tests/api/test_gradcache.py tests/api/test_compat.py)
    kernels=(--targets 90 --dtypes bfloat16 --dims 128) # there is no table of this one
    ;;
*)
    sed -n '2,8s/^# \?//p' "$0" >&2
    exit 2
    ;;
esac

here=build/$environment
[ -x "$here/bin/python" ] || "$python" -m venv "$here"
in_it=$PWD/$here/bin/python
grep -v '^torch\|^triton' constraints.txt >"$here/constraints.txt"
"$in_it" -m pip install --quiet --constraint "$here/constraints.txt" "${versions[@]}" \
    ninja 'setuptools>=77' hypothesis numpy pytest pytest-xdist rich "${extras[@]}"
if [ "$what" = kernels ]; then
    PYTHONPATH=. exec "$in_it" -m benchmarks.resources "${@:2}"
fi
CLOP_NATIVE=1 CLOP_CUDA_ARCHS="${CLOP_CUDA_ARCHS:-90}" "$in_it" -m pip install --quiet --no-deps --no-build-isolation --force-reinstall .

# A copy of what tests it, so that the package is the installed one.
rm -rf "$here/run"
mkdir "$here/run"
cp -r tests benchmarks pyproject.toml "$here/run"
cd "$here/run"
"$in_it" -m clop_kernels info
OMP_NUM_THREADS=1 "$in_it" -m pytest -q -p no:cacheprovider -n logical "${tests[@]}"
if [ "${#kernels[@]}" -gt 0 ]; then
    "$in_it" -m benchmarks.resources "${kernels[@]}"
fi
