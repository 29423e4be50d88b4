"""Serve the bundle of this image: on the port that the variable PORT names, with the options of `cvnb serve`."""
import os
import sys

from cvnb.cli.app import main

sys.argv[:1] = ["cvnb", "serve", os.environ.get("CVNB_BUNDLE", "/bundle"), "--host", "0.0.0.0"]
main()
