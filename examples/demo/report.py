"""Turn the results of a run into one page: `python examples/demo/report.py output/demo/results.json`.

The page needs nothing else: no script, no font, no image file. The plot is also written as `curves.svg`.
"""
