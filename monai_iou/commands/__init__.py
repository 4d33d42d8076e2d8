"""The commands of `monai-iou`, a module for each family of them.

`monai_iou_command` loads this folder by its path under the name `monai_iou_commands`, so nothing at the top of a module
here may import `monai_iou`, torch or MONAI: each command imports what it needs, and its siblings by relative names.
"""
