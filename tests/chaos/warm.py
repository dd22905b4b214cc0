"""What the pipeline's steps import, for the process that drivers are forked from: they start at once instead of in ten seconds."""

import boto3  # noqa: F401
import transformers.models.mixtral.modeling_mixtral  # noqa: F401

import moeflow.cli
import moeflow.methods.calibrate.steps
import moeflow.methods.checkpoint.steps
import moeflow.methods.prune.subset_search
import moeflow.methods.rewrite
import moeflow.model.passes  # noqa: F401
