"""Evaluating folders of volumes: reading, pairing, one row per case and label, tables and a report.

The modules read one way: grid <- volumes <- pairing, cases <- schedule <- evaluate -> statistics, report; compare reads
evaluated folders. nibabel, SimpleITK, scipy, jinja2, rich and dask are imported where they are used, so that
`import monai_iou` stays light.
"""
