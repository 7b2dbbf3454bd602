#!/usr/bin/env bash
# The wheel and the sdist as a user gets them: built, and installed where nothing else is. With --extras each
# extra as well, which takes minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3.11}

"$python" -m venv "$work/build"
"$work/build/bin/pip" install --quiet build hatchling
"$work/build/bin/python" -m build --no-isolation --outdir "$work/dist" . > "$work/build.log" || { cat "$work/build.log"; exit 1; }
ls "$work/dist"

fresh() {  # a new environment with the wheel, or one of its extras
  rm -rf "$work/user"
  "$python" -m venv "$work/user"
  "$work/user/bin/pip" install --quiet "$(echo "$work"/dist/*.whl)$1"
}
imports() { (cd "$work" && user/bin/python -c "import $1"); }

fresh ""
# From here none of the checkout can be imported in place of the wheel.
(cd "$work" && user/bin/python - <<'PYTHON'
import jax, optax
import eupmu_jax as eu, eupmu_jax.evaluation, eupmu_jax.flax

losses_fn = lambda x, batch: eu.Losses((x - batch) ** 2, x**2)
tx = eu.eupmu(losses_fn, optax.sgd(0.1), eu.Budget(0.1, baseline=0.0))
step, x, state = eu.training_step(tx, jax.numpy.array(0.0))
x, state, info = step(x, state, jax.numpy.array(1.0))
assert 0 < x < 1, x
PYTHON
)
(cd "$work" && user/bin/python -m eupmu_jax)
said=$("$work/user/bin/eupmu" --help 2>&1 || true)
grep -q 'extra "cli"' <<< "$said"
# Not in a pipe: grep ends at the first hit, and what still writes would fail.
tar --list --file "$work"/dist/*.tar.gz > "$work/files"
grep -q '/docs/conf.py$' "$work/files"

[ "${1:-}" = --extras ] || exit 0
for pair in evaluation:sklearn run:orbax.checkpoint cli:eupmu_jax.cli.config tensorboard:tensorboardX \
  experiments:pandas language:gguf docs:myst_nb; do
  echo "extra ${pair%%:*}"
  fresh "[${pair%%:*}]"
  imports eupmu_jax
  imports "${pair##*:}"
done
