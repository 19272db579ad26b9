"""The HTML template of a report: its style sheet, for narrow and wide screens in light and dark mode."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>tpaw_jax report</title>
<style>
:root { --page: #ffffff; --text: #1c2024; --soft: #667078; --line: #d5dade; --card: #f5f7f8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181b; --text: #e4e8eb; --soft: #98a2aa; --line: #363d43; --card: #1d2226; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem clamp(0.8rem, 3vw, 2.5rem) 4rem; max-width: 90rem; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; margin: 0.5rem 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0.6rem; padding-bottom: 0.25rem; border-bottom: 1px solid var(--line); }
h4 { margin: 0 0 0.25rem; font-size: 0.8rem; color: var(--soft); font-weight: 600; }
p { margin: 0.4rem 0; color: var(--soft); }
details { margin: 0.5rem 0; }
summary { cursor: pointer; font-weight: 600; padding: 0.25rem 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.86rem; }
th, td { padding: 0.16rem 0.8rem 0.16rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--page); font-weight: 500; }
.tables { display: flex; flex-wrap: wrap; gap: 0.5rem 2.5rem; }
.tables > details { max-width: 100%; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
figure { margin: 0; padding: 0.6rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.plot { width: 100%; height: auto; display: block; color: var(--text); }
.sample { margin: 1rem 0 1.6rem; }
.prompt { color: var(--text); font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere; }
.answers { display: grid; gap: 0.6rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); }
.answers > div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 0.6rem; }
.answers p { color: var(--text); white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-size: 0.88rem; }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 0.8rem;
  font-size: 0.8rem; }
</style>
</head>
<body>
<!-- body -->
</body>
</html>
"""
