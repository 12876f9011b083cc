"""The studio: a page to steer pictures, look at rewards and open run folders, by gradio."""
