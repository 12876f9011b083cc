"""The studio: a gradio page to steer pictures, inspect rewards and open run folders."""
