"""Self-supervised learning from head-camera videos: the package that all scripts share.

The published code has its helpers for MoCo in a folder of this name; here it contains those of all methods. The modules
directly in this folder may be imported from anywhere, those of a sub-package by scripts and by the sub-packages after
"for":

    cli                     command-line flags, errors as one line, progress
    files                   atomic writes, output folders, small text files, args.json
    distributed             devices, and the processes of a job
    builder                 MoCo, as in its paper
    plots                   figures of numbers: curves, bars, matrices, points
    pictures                figures of images

    networks/               for training, analysis and builder
        architectures       architectures by name
        layers              inner layers, as means over space
        vit                 vision transformers of any size
        checkpoint          reading and writing networks
        naming              the names of other libraries' tensors, in torchvision's
        finding             the network in a file or folder, by how its tensors fit architectures
        opening             the model that a user names
        released            published networks by name

    data/                   for videos, training and analysis
        manifest            the plan of a frame folder
        recordings          child, date and age; order; which of them to use; where an image is from, and tables of it
        folders             the images of one or several folders, by index
        tars                images in tars
        loader              the order of images in an epoch, its batches, and the processes that read them
        augment             augmentation

    videos/
        video               one file: decoding some of its frames
        probe               one file: how many frames it has, in which order, when
        planning            many files -> the plan of their frames
        extract             a plan -> a frame folder: crop, JPEG, resume
        pool                worker processes that may crash

    training/
        engine              one epoch, and its metrics over all processes
        run                 a run's position, saving, resuming, logging
        cpu                 faster training on a CPU

    analysis/
        features            features of images, in arrays on disk
        embeddings          embeddings of many images: groups, dissimilarities and how they correlate, t-SNE
        units               statistics of single units
        splits              training and test images
        accuracy            accuracies, published values, differences between models
        report              readouts, and what an evaluation writes
        film                maps of a network over images, and films of them

The way of a video: read_saycam.main -> planning.make_plan, which probes every file (plan_video, probe.probe) and
numbers the slots of all images (manifest.make) -> extract.read_videos -> extract_images, in a worker process, which
decodes (video.frames), crops and writes.

The way of a training step: temporal_classification.train builds model, FrameLoader and Run -> engine.train_one_epoch
-> FrameLoader.epoch: indices from EpochSampler, images from BatchDataset (augment) in workers -> the objective -> Run,
which sums metrics (engine.MetricSums), saves and logs.

The way of a decoding result: linear_decoding.decode -> features.extract_features, cached -> fit on the training side of
a split (splits) -> accuracy, report.

To add
    an objective            write objective(model, images, targets) -> (loss, {name: metric}) in a script of its own, as
                            tests/support/simsiam.py does in 40 lines; temporal_classification.py has all flags
    an evaluation           take features.extract_features; a readout of linear_decoding.py and hog_baseline.py is a
                            function and an entry of report.FITS
    a checkpoint format     most need nothing (networks are found by fit); else add the names of a library to the tables
                            in naming, a layout to finding._layouts, or another file format to checkpoint.read
"""
