"""What people look at: the HTML report of one or several runs, which needs the optional matplotlib, and a run's data.

Read `run_report` first (from run directories to the page), then `figures` (its plots), `page` (the HTML template) and
`data_preview` (`tpaw data`).
"""
