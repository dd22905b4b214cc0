"""Make a model fit into a budget, as `moeflow fit` does; `moeflow.methods.recipes.fitted` says how.

    ray job submit --working-dir . -- python pipelines/fit.py --store s3://bucket/prefix --gpus 1 -p model=MODEL \\
        -p budget.bytes=24GB
"""

from moeflow.cli import main
from moeflow.methods.recipes.fitted import build

if __name__ == "__main__":
    main(build)
