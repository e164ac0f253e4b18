package procfs

import (
	"io"
	"io/fs"
	"syscall"

	"golang.org/x/sys/unix"
)

// file is a descriptor of a file in /proc. os.File would try to register each
// with the poller, which costs more than most of these reads.
type file struct {
	fd   int
	path string
}

func open(path string) (*file, error) {
	return opened(path, func() (int, error) {
		return syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	})
}

// openDirectory opens a process's directory, for openAt only.
func openDirectory(path string) (*file, error) {
	return opened(path, func() (int, error) {
		return syscall.Open(path, unix.O_PATH|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	})
}

// openAt opens a file of the process whose directory dir is: never one of a
// later process with the same number.
func openAt(dir *file, name string) (*file, error) {
	return opened(dir.path+"/"+name, func() (int, error) {
		return syscall.Openat(dir.fd, name, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	})
}

func opened(path string, call func() (int, error)) (*file, error) {
	for {
		fd, err := call()
		switch err {
		case nil:
			return &file{fd: fd, path: path}, nil
		case syscall.EINTR:
		default:
			return nil, pathError("open", path, err)
		}
	}
}

func (f *file) Read(b []byte) (int, error) {
	for {
		n, err := syscall.Read(f.fd, b)
		switch {
		case err == syscall.EINTR:
		case err != nil:
			return 0, pathError("read", f.path, err)
		case n == 0 && len(b) > 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
}

// close has no error worth knowing: these files are read only.
func (f *file) close() { _ = syscall.Close(f.fd) }

// pathError makes the two ways in which the kernel says that a process is gone
// one: fs.ErrNotExist.
func pathError(op, path string, err error) error {
	if err == syscall.ESRCH {
		err = syscall.ENOENT
	}
	return &fs.PathError{Op: op, Path: path, Err: err}
}

// lines calls fn for each line of the file at path.
func lines(path string, buf []byte, fn func(line []byte)) error {
	f, err := open(path)
	if err != nil {
		return err
	}
	defer f.close()
	return f.lines(buf, fn)
}

// linesAt does so for a file of the process whose directory dir is.
func linesAt(dir *file, name string, buf []byte, fn func(line []byte)) error {
	f, err := openAt(dir, name)
	if err != nil {
		return err
	}
	defer f.close()
	return f.lines(buf, fn)
}

func (f *file) lines(buf []byte, fn func(line []byte)) error {
	err := eachLine(f, buf, fn)
	if err == errLineTooLong {
		err = &fs.PathError{Op: "read", Path: f.path, Err: err}
	}
	return err
}

// head reads the file from its beginning until buf is full.
func (f *file) head(buf []byte) ([]byte, error) {
	n, err := io.ReadFull(f, buf)
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		err = nil
	}
	return buf[:n], err
}
