"""The HTML report of one or several runs; needs the optional matplotlib.

Read `run_report` first (from run directories to the page), then `figures` (its plots) and `page` (the HTML template).
"""
