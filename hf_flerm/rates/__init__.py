"""The definition of a rate (`reference.py`: read it first) and the fast estimators of it on a model (`probe.py`).

To add a metric, add an entry to `METRICS` in `metrics.py` and its name to `Metric` in `hf_flerm/choices.py`. To add a
layer type, see `per_example/layers.py`.
"""
