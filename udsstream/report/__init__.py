"""A run on one page: what was chosen and why, for people; offline, without scripts.

    write      write_report(): from a run's folder to a page on disk
    figures    the numbers, in one pass and bounded memory
    samples    which few samples to show, and their text from the streams
    plots      figures to SVG, in the page's own colours
    page       everything to HTML
    text       what others wrote, made fit to be shown

Imports neither torch nor Composer; Streaming only to read text.
"""
