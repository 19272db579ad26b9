"""The HTML page that shows one run or several."""
